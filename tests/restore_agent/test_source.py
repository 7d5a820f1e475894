"""Small objects of any source: read whole, and refused where somebody put something large in their place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from restore_agent.transfer.directory import Directory
from restore_agent.transfer.source import Absent, Altered, Piece, Unreachable, read_whole


async def test_a_small_object_is_read_whole_and_a_large_one_is_refused(tmp_path: Path) -> None:
    store = Directory(tmp_path)
    await store.put("names/a/b.json", b"twelve bytes")
    assert await read_whole(store, "names/a/b.json", 12) == b"twelve bytes"
    with pytest.raises(Altered, match=r"names/a/b\.json of file://.* has more than the 11 bytes"):
        await read_whole(store, "names/a/b.json", 11)
    with pytest.raises(Absent):
        await read_whole(store, "names/a/c.json", 11)
    await store.close()


class _Endless:
    """It sends more than it was asked for, without an end; where it is `slow`, only once somebody has given up."""

    def __init__(self, *, slow: bool) -> None:
        self.slow = slow
        self.ended = False

    def __str__(self) -> str:
        return "agent 10.1.2.3:9447"

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        try:
            yield b"some"
            while True:
                await (asyncio.Event().wait() if self.slow else asyncio.sleep(0))
                yield b"more"
        finally:
            self.ended = True

    async def size(self, key: str) -> int:
        raise Absent(key)


async def test_a_source_that_sends_without_an_end_is_left_at_the_limit() -> None:
    source = _Endless(slow=False)
    with pytest.raises(Altered, match=r"manifest\.json of agent 10\.1\.2\.3:9447 has more than the 1000 bytes"):
        await read_whole(source, "manifest.json", 1000)
    assert source.ended


async def test_a_source_that_sends_a_little_and_no_more_is_left_in_time() -> None:
    source = _Endless(slow=True)
    with pytest.raises(Unreachable, match=r"10\.1\.2\.3:9447 has sent 4 bytes of manifest\.json in 0\.05 s, and not all"):
        await read_whole(source, "manifest.json", 1000, 0.05)
    assert source.ended
