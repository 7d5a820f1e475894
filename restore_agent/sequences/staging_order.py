"""In which order images are read into memory: a request that waits overtakes everything.

Two are read at a time, in the order in which they were wanted: more would only share the disk, and each be there later. What a request
waits for is read at once, beside whatever number of others that requests wait for. As long as that takes, nothing else begins, and what has
begun pauses between two chunks: the disk is the request's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from restore_agent.pages.fill import Arena

_AT_ONCE = 2


class Turn:
    """One image's place in the order."""

    def __init__(self) -> None:
        self.is_urgent = False  # a request waits for it
        self.has_paused = False  # since it began
        self._arena: Arena | None = None
        self._goes = asyncio.Event()

    def reads_into(self, arena: Arena) -> None:
        """From now on it can be paused."""
        self._arena = arena
        self.goes(self._goes.is_set())

    async def come(self) -> None:
        """Returns when it may begin."""
        await self._goes.wait()

    def goes(self, on: bool) -> None:
        """Whether it goes on, or waits."""
        if on:
            self._goes.set()
        else:
            self._goes.clear()
        if self._arena:
            self.has_paused |= not on
            self._arena.pause(not on)


class StagingOrder:
    """The order of one node."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []  # those that wait and those that read, as they came

    @contextlib.asynccontextmanager
    async def turn(self, turn: Turn) -> AsyncIterator[None]:
        """The block is run when it is its turn, which ends with it."""
        self._turns.append(turn)
        self._arrange()
        try:
            await turn.come()
            yield
        finally:
            self._turns.remove(turn)
            self._arrange()

    def hurry(self, turn: Turn) -> None:
        """A request waits for it: its turn is now."""
        turn.is_urgent = True
        self._arrange()

    def _arrange(self) -> None:
        hurry = any(turn.is_urgent for turn in self._turns)
        calm = [turn for turn in self._turns if not turn.is_urgent]
        for turn in self._turns:
            turn.goes(turn.is_urgent or (not hurry and turn in calm[:_AT_ONCE]))
