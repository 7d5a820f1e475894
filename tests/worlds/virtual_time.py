"""Time that passes only when nothing is left to do: hours of timers run in as long as their callbacks take, and every run is the same.

A loop waits in its selector until the next timer is due. Here the selector does not wait: it looks whether a descriptor is ready, and if
none is, sets the time to that of the timer. Time is kept to the microsecond, so that 0.1 + 0.2 is 0.3. When no timer is left and no
descriptor is ready nothing can ever happen again, which is an error and not a hang.
Rejected: looptime (0.9, of PyPI), which waits for sockets in real time, as nothing here needs, and takes 110 µs a wake-up instead of 8;
time-machine and freezegun, which replace the system's functions under code that should have been given a clock.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_RESOLUTION = 1e-6


class _Jumping(selectors.DefaultSelector):
    """The selector, and the time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise RuntimeError(f"nothing can happen any more, {self.now:g} s after the beginning: all tasks wait, and no timer is set")
        self.now = round(self.now + max(timeout, _RESOLUTION), 6)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time begins at 0 and jumps to the next timer."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)
        self._clock_resolution = _RESOLUTION  # a timer due within it is run

    def time(self) -> float:
        return self._jumping.now


class LoopClock:
    """The clock of whatever runs in `loop`. Its wall clock begins at `wall`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wall: float = 1_800_000_000.0) -> None:
        self.now = loop.time
        self._wall = wall

    def wall(self) -> float:
        return self._wall + self.now()


class StandingClock:
    """A clock that stands until it is set."""

    def __init__(self, moment: float = 0.0) -> None:
        self.moment = moment

    def now(self) -> float:
        return self.moment

    def wall(self) -> float:
        return self.moment


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs it to its end in a loop of virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)
