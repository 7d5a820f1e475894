"""The two ladders of a snapshot on a node, by number as in proto/agent.proto: a higher rung includes the lower ones."""

from __future__ import annotations

import enum


class Rung(enum.IntEnum):
    """Where the image stands. STANDBY: a replica whose memory is there and whose tasks stand still."""

    ABSENT = 1
    DISK = 2
    MEMORY = 3
    STANDBY = 4


class WeightsRung(enum.IntEnum):
    """Where the weights stand. MEMORY: gpumem's arena. GPU: memory that gpumem lends, a GPU's or the host's."""

    ABSENT = 1
    DISK = 2
    MEMORY = 3
    GPU = 4
