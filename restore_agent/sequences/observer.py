"""Who is told of what a node does, to count it (service/metrics.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from restore_agent.sequences.replicas import Origin
from restore_agent.sequences.standby import Rung


class Observer(Protocol):
    """Hears of replicas as they are made, and of snapshots that were asked for in vain."""

    def restored(self, model: str, origin: Origin, phases: Iterable[tuple[str, float]]) -> None:
        """From a snapshot, or by waking its standby, parked or not; `phases`: where the seconds went."""

    def started_cold(self, model: str) -> None:
        """By its own command."""

    def fell_back(self, model: str, reason: str) -> None:
        """It was not restored; `reason` is one of a few keys."""

    def replicas_are(self, count: int) -> None:
        """So many live on the node."""

    def standbys_are(self, counts: Mapping[Rung, int], parked: Mapping[str, int]) -> None:
        """So many stand on each rung, and all that are parked, in pods as well, hold so many bytes of each GPU."""

    def sleepers_are(self, counts: Mapping[Rung, int]) -> None:
        """So many sleep in pods, on each rung."""
