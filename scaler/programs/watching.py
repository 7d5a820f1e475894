"""`zerowake status --watch`: drawn again each second on a terminal; in a pipe or a file, one line for each change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rich.console import Console
from rich.live import Live

from scaler.view import status_shown
from scaler.view.state import State

_EVERY_SECONDS = 1.0


async def watch(look: Callable[[], Awaitable[State]], console: Console) -> None:
    """Until it is cancelled, or `look` raises."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                live.update(status_shown.view(await look()), refresh=True)
                await asyncio.sleep(_EVERY_SECONDS)
    before: State | None = None
    while True:
        state = await look()
        for line in status_shown.changes(before, state):
            console.print(line, soft_wrap=True)
        console.file.flush()
        before = state
        await asyncio.sleep(_EVERY_SECONDS)
