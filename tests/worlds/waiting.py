"""Waiting for what tells nobody when it comes true: the one place in the tests that looks again and again.

Where something does tell (a stream, a subscription, an event), tests wait for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

PATIENCE = 30.0  # seconds; the machine may do something else besides
_EVERY = 0.005  # seconds; it is also what a wait can be too long by


async def until(holds: Callable[[], object], what: str = "it", within: float = PATIENCE) -> float:
    """Waits for `holds` to be true of what runs in this loop or elsewhere; returns the seconds that it took.

    Raises:
        AssertionError: it was not true within so many seconds.
    """
    for seconds in _looks(holds, what, within):
        if seconds is not None:
            return seconds
        await asyncio.sleep(_EVERY)
    raise AssertionError


def blocking_until(
    holds: Callable[[], object], what: str = "it", within: float = PATIENCE, not_yet: tuple[type[Exception], ...] = ()
) -> float:
    """As `until`, outside of an event loop. `not_yet`: errors of `holds` that say no more than that it is not true yet."""
    for seconds in _looks(holds, what, within, not_yet):
        if seconds is not None:
            return seconds
        time.sleep(_EVERY)
    raise AssertionError


def _looks(holds: Callable[[], object], what: str, within: float, not_yet: tuple[type[Exception], ...] = ()) -> Iterator[float | None]:
    """One look after the other: None while it is not so, then the seconds until it was."""
    began = time.monotonic()
    while True:
        with suppress(*not_yet):
            if holds():
                yield time.monotonic() - began
        assert time.monotonic() - began < within, f"{what}: not so within {within:g} s"
        yield None
