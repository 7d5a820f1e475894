"""A source of chunks in memory that fails as it is told to, chunk by chunk, and tells what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from blake3 import blake3

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.layout import chunk_key
from restore_agent.transfer.source import Absent, Piece, Unreachable


def chunk_of(data: bytes) -> Chunk:
    return Chunk(blake3(data).hexdigest(), len(data))


class FaultySource:
    """`read` sends pieces of `piece` bytes. `asked` has each call's chunk and offset."""

    def __init__(self, name: str, contents: Iterable[bytes] = (), piece: int = 1000) -> None:
        self._name = name
        self._piece = piece
        self.contents = {chunk_key(chunk_of(data).hash): data for data in contents}
        self.asked: list[tuple[str, int]] = []
        self.breaks_after: int | None = None  # bytes of each call, then it breaks off
        self.refuses: Callable[[str], Exception | None] = lambda key: None
        self.hangs = False  # sends nothing, and does not end
        self.pause = 0.0  # seconds before each piece
        self.sends_too_much = False

    def __str__(self) -> str:
        return self._name

    def replace(self, chunk: Chunk, data: bytes) -> None:
        """It has these bytes under that name from now on."""
        self.contents[chunk_key(chunk.hash)] = data

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        self.asked.append((key.rpartition("/")[2], offset))
        if error := self.refuses(key):
            raise error
        if key not in self.contents:
            raise Absent(f"{self} has no {key}")
        if self.hangs:
            await asyncio.Event().wait()
        data = self.contents[key][offset:] if self.sends_too_much else self.contents[key][offset : offset + length]
        for at in range(0, len(data), self._piece):
            if self.pause:
                await asyncio.sleep(self.pause)
            if self.breaks_after is not None and at >= self.breaks_after:
                raise Unreachable(f"{self} broke off")
            yield data[at : at + self._piece]

    async def size(self, key: str) -> int:
        if key not in self.contents:
            raise Absent(f"{self} has no {key}")
        return len(self.contents[key])
