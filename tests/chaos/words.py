"""What a helper of the run is told on its input, a word a line."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator


async def heard() -> AsyncIterator[str]:
    """Each word, until the input ends."""
    words: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(words.put_nowait, line.strip())
        loop.call_soon_threadsafe(words.put_nowait, "")

    threading.Thread(target=listen, daemon=True).start()
    while word := await words.get():
        yield word
