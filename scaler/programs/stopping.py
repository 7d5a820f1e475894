"""How a program is asked to stop."""

from __future__ import annotations

import asyncio
import signal


def stopped_by(*signals: signal.Signals) -> asyncio.Event:
    """Set when the first of these signals comes, which then does nothing else. Called inside the event loop."""
    stop = asyncio.Event()
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
