"""A store in a folder: objects whole or not at all, ranges, and what the system says in the words of a source."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.transfer.directory import Directory
from restore_agent.transfer.source import Absent, Denied, Full, TransferError, Unreachable, read_whole

LARGE = random.Random(3).randbytes((4 << 20) + 4096 + 7)  # more than a thread reads in one go, and no whole number of blocks


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Directory]:
    store = Directory(tmp_path)
    yield store
    await store.close()


async def _read(store: Directory, key: str, offset: int, length: int) -> bytes:
    return b"".join([bytes(piece) async for piece in store.read(key, offset, length)])


@pytest.mark.parametrize(("offset", "length"), [(0, len(LARGE)), (1, 5000), (4096, 4 << 20), (4 << 20, 1 << 30), (len(LARGE), 5), (0, 0)])
async def test_a_range_is_read_as_far_as_the_object_goes(store: Directory, offset: int, length: int) -> None:
    await store.put("chunks/ab/abc", LARGE)
    assert await _read(store, "chunks/ab/abc", offset, length) == LARGE[offset : offset + length]
    assert await store.size("chunks/ab/abc") == len(LARGE)


async def test_two_readers_at_once_do_not_meet_and_memory_is_used_again(store: Directory) -> None:
    for key, byte in (("a", b"a"), ("b", b"b")):
        await store.put(key, byte * 10000)
    async for one in store.read("a", 0, 10000):
        async for other in store.read("b", 0, 10000):
            assert (bytes(one), bytes(other)) == (b"a" * 10000, b"b" * 10000)
    assert await _read(store, "b", 0, 10000) == b"b" * 10000


async def test_what_is_written_is_for_everybody_to_read_and_leaves_nothing_beside(store: Directory, tmp_path: Path) -> None:
    await store.put("names/a/b.json", b"old")
    await store.put("names/a/b.json", b"new")
    assert await read_whole(store, "names/a/b.json", 9) == b"new"
    assert [path.name for path in (tmp_path / "names/a").iterdir()] == ["b.json"]
    assert stat.S_IMODE((tmp_path / "names/a/b.json").stat().st_mode) == 0o644


async def test_a_list_has_what_is_whole(store: Directory, tmp_path: Path) -> None:
    await store.put("chunks/ab/abc", b"1")
    await store.put("chunks/cd/cde", b"22")
    await store.put("names/a/b.json", b"333")
    (tmp_path / "chunks/ab/.abd.partial").write_bytes(b"half")
    assert {(found.key, found.size) async for found in store.objects("chunks")} == {("chunks/ab/abc", 1), ("chunks/cd/cde", 2)}
    assert len([found async for found in store.objects("")]) == 3
    assert [found async for found in store.objects("snapshots")] == []


async def test_removing_what_is_not_there_is_no_error(store: Directory) -> None:
    await store.put("a", b"1")
    await store.remove("a")
    await store.remove("a")
    with pytest.raises(Absent, match="has no a"):
        await store.size("a")


async def test_a_folder_that_is_not_there_is_no_empty_store(tmp_path: Path) -> None:
    store = Directory(tmp_path / "unmounted")
    with pytest.raises(Unreachable, match="mount it, or make the folder"):
        await store.size("names/a/b.json")
    with pytest.raises(Unreachable):
        await store.put("names/a/b.json", b"1")
    with pytest.raises(Unreachable):
        _ = [found async for found in store.objects("names")]
    assert not (tmp_path / "unmounted").exists()
    await store.close()


@pytest.mark.parametrize("key", ["../outside", "a//b", "/etc/passwd", ""])
async def test_a_key_does_not_lead_out_of_the_store(store: Directory, key: str) -> None:
    with pytest.raises(Denied, match="no key of a store"):
        await store.size(key)


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.EACCES, Denied), (errno.EROFS, Denied), (errno.ENOSPC, Full), (errno.EDQUOT, Full), (errno.EIO, Unreachable)],
)
async def test_what_the_system_says_is_one_of_few_words(
    store: Directory, number: int, word: type[TransferError], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(word, match=os.strerror(number)):
        await store.put("chunks/ab/abc", b"1")
    assert list((tmp_path / "chunks/ab").iterdir()) == []


async def test_a_file_where_a_folder_is_expected_is_an_object_that_is_absent(store: Directory) -> None:
    await store.put("chunks", b"1")
    with pytest.raises(Absent):
        await store.size("chunks/ab/abc")
