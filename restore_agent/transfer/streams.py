"""Many pieces of work beside each other, each stream with memory of its own that it uses again.

New memory costs the kernel as much as reading into it, and a bound on the streams is a bound on the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from restore_agent.snapshots.chunks import CHUNK
from zerowake_shared.background import first_error

STREAMS = 16  # what reaches a network's rate where one connection reaches a part of it
_T = TypeVar("_T")


class Room:
    """Memory of one stream."""

    def __init__(self) -> None:
        self._memory = bytearray(0)

    def of(self, size: int) -> memoryview:
        """So many bytes of anything; those that were given before are these."""
        if len(self._memory) < size:
            self._memory = bytearray(max(size, CHUNK))
        return memoryview(self._memory)[:size]


async def in_streams(items: Iterable[_T], streams: int, work: Callable[[_T, Room], Awaitable[None]]) -> None:
    """Does the work of each item, so many at once, in their order. Raises the first error, once all others have ended."""
    todo = iter(items)

    async def stream() -> None:
        room = Room()
        for item in todo:
            await work(item, room)

    with first_error():
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream(), name="stream of chunks")
