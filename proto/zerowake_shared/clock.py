"""Where time and chance come from: both are given to whoever needs them, so that a test can give others.

A program has one clock. It is not the event loop's: uvloop's is read once a turn and in whole milliseconds, and phases of tenths of a
millisecond are measured. The loop's own time is asked only to move a timer of the loop. Under a loop whose time is virtual the clock given
is one that reads the loop, and then nothing else in a program knows what time it is.
"""

from __future__ import annotations

import random
import time
from typing import Protocol


class Clock(Protocol):
    """Two readings of the same moment."""

    def now(self) -> float:
        """Seconds from any beginning, never less than before: what lengths and deadlines are counted in."""

    def wall(self) -> float:
        """Seconds since 1970, for people and for other machines; it may be set back."""


class SystemClock:
    """The operating system's. Its methods are the system's own functions: one call, with nothing of ours around it."""

    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


SYSTEM_CLOCK: Clock = SystemClock()
# Names and spreads. Nothing that it makes can be foretold, so an id may stand where somebody might guess it.
SYSTEM_CHANCE: random.Random = random.SystemRandom()


def token(chance: random.Random, size: int) -> str:
    """A new name of `size` bytes, as twice as many hex digits."""
    return chance.randbytes(size).hex()
