"""The two ladders of a snapshot on a node, by number as in proto/agent.proto: a higher rung includes the lower ones."""

from __future__ import annotations

import enum


class Rung(enum.IntEnum):
    """Where the image stands. STANDBY: a replica whose memory is there and whose tasks stand still. PARKED: one whose GPU state is on the
    GPU, too, without weights or anything else that it was lent."""

    ABSENT = 1
    DISK = 2
    MEMORY = 3
    STANDBY = 4
    PARKED = 5


class WeightsRung(enum.IntEnum):
    """Where the weights stand. MEMORY: gpumem's arena. GPU: memory that gpumem lends, a GPU's or the host's."""

    ABSENT = 1
    DISK = 2
    MEMORY = 3
    GPU = 4
