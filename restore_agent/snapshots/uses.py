"""How often this node has used each snapshot of late: restored it, or woken what was restored before. The first time that somebody wants it
here counts as one, too: who is new has as much of a chance as who was used a moment ago.

A use counts half after a day, a quarter after two: so both what is used often and what was used just now count more than what nobody has
asked for since last week. One small file for each snapshot, of the node's own, which travels nowhere and may be lost: then nothing is known
of that one. It stays a month after the last use, also without its snapshot, which may come back.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from zerowake_shared import durable
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_HALF = 24 * 3600.0  # seconds
_KEPT = 30 * _HALF


class Uses:
    """Of one state folder. `keep` blocks on the disk; everything else asks memory."""

    def __init__(self, folder: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder = folder
        self._clock = clock
        self._counts: dict[str, tuple[float, float]] = {}  # digest → so many, at that time
        now = clock.wall()
        for path in folder.iterdir() if folder.exists() else ():
            try:
                count, at = map(float, path.read_text().split())
            except (OSError, ValueError):  # torn, or another's
                count, at = 0.0, 0.0
            if now - at < _KEPT:
                self._counts[path.name] = count, at
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    def of(self, digest: str) -> float:
        """Uses of late; 0.0: none that is known."""
        count, at = self._counts.get(digest, (0.0, 0.0))
        halves = max(0.0, self._clock.wall() - at) / _HALF  # never more than there were, also where the clock was set back
        return count * math.pow(0.5, halves)

    def used(self, digest: str) -> None:
        """Now, once more. `keep` writes it down."""
        self._counts[digest] = self.of(digest) + 1.0, self._clock.wall()

    def wanted(self, digest: str) -> bool:
        """For the first time that is known: counts as a use, and is to be kept. Else nothing."""
        if new := digest not in self._counts:
            self.used(digest)
        return new

    def keep(self, digest: str) -> None:
        """For the next agent. A disk that refuses is nobody's trouble."""
        count, at = self._counts[digest]
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            durable.replace(self._folder / digest, f"{count} {at}\n".encode())
