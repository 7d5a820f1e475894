"""What a start waits for: the first look for its model's snapshot, here and in the store, and its way back here if it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Look:
    """Of one model."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.bring: Callable[[], Awaitable[object]] | None = None  # once the store has it: has it here again, where it is not

    async def is_over(self) -> None:
        """Returns when a replica may be made, of the snapshot or without."""
        await self.done.wait()
        if self.bring:
            await self.bring()
