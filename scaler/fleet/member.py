"""What is known of another replica of the scaler, whatever it says."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Hearing(enum.Enum):
    """How a peer stands. SILENT: nothing is heard of it, and it may live. GONE: it has ended, or nothing listens there."""

    UNASKED = "unasked"
    HEARD = "heard"
    SILENT = "silent"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Member:
    """One of the other replicas. instance, born: what it said last; empty and 0 before it has said anything."""

    address: str
    instance: str
    born: float
    hearing: Hearing

    @property
    def shares_none(self) -> bool:
        """It is of a version that knows nothing of places that gateways share."""
        return bool(self.instance) and not self.born


@dataclass(frozen=True, slots=True)
class Flights:
    """What a gateway has in flight of a model, and how often a request came to be."""

    in_flight: int
    begun: int
