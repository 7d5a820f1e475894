"""How a program is asked to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine


def stopped_by(*signals: signal.Signals) -> tuple[asyncio.Event, asyncio.Event]:
    """Two events: set when the first of these signals comes, and when the second does. They do nothing else. Called inside the event loop.

    The first asks for an end in good order, the second for one at once.
    """
    stop, at_once = asyncio.Event(), asyncio.Event()

    def heard() -> None:
        (at_once if stop.is_set() else stop).set()

    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, heard)
    return stop, at_once


async def unless(event: asyncio.Event, work: Coroutine[object, object, None]) -> None:
    """Returns when the work is done, or cancelled because the event was set. Raises what the work raises."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, waiting):
            each.cancel()
        await asyncio.wait([task, waiting])
