"""Who is told of what a node does, to count it (service/metrics.py)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from restore_agent.errors import FAILURES, reason_of
from restore_agent.sequences.replicas import Origin
from restore_agent.sequences.standby import Rung


class Observer(Protocol):
    """Hears of replicas as they are made, of snapshots that were asked for in vain, and of what was captured and staged."""

    def restored(self, model: str, origin: Origin, phases: Iterable[tuple[str, float]], stood: str) -> None:
        """From a snapshot, or by waking its standby, parked or not; `phases`: where the seconds went. `stood`: the rung on which it was
        found: parked, standby, memory, disk, or remote, which it was waited from."""

    def started_cold(self, model: str) -> None:
        """By its own command."""

    def fell_back(self, model: str, reason: str) -> None:
        """It was not restored; `reason` is one of a few keys."""

    def captured(self, model: str, seconds: float) -> None:
        """A snapshot was taken and proved."""

    def capture_failed(self, model: str, reason: str) -> None:
        """It was not; `reason` is one of a few keys."""

    def staged(self, rung: str, size: int, seconds: float) -> None:
        """So many bytes went up to a rung: disk, memory, gpu (weights)."""

    def staging_failed(self, rung: str, reason: str) -> None:
        """They did not; `reason` is one of a few keys."""

    def replicas_are(self, count: int) -> None:
        """So many live on the node."""

    def standbys_are(self, counts: Mapping[Rung, int], parked: Mapping[str, int]) -> None:
        """So many stand on each rung, and all that are parked, in pods as well, hold so many bytes of each GPU."""

    def sleepers_are(self, counts: Mapping[Rung, int]) -> None:
        """So many sleep in pods, on each rung."""


@contextlib.contextmanager
def capture_told(observer: Observer, model: str) -> Iterator[None]:
    """What becomes of the capture that is made in the block. One that is cancelled has neither failed nor been taken."""
    begin = time.monotonic()
    try:
        yield
    except FAILURES as error:
        observer.capture_failed(model, reason_of(error))
        raise
    observer.captured(model, time.monotonic() - begin)
