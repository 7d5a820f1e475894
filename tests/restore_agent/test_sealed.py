"""A store that is encrypted: what lies there says nothing, and what is read is what was put, or a word that says what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from restore_agent.snapshots.chunks import CHUNK
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.fetch import Fetch, Patience
from restore_agent.transfer.layout import chunk_key, manifest_key, name_key, signature_key
from restore_agent.transfer.sealed import Sealed
from restore_agent.transfer.sealing import HEAD, SEGMENT
from restore_agent.transfer.source import Absent, Altered, Denied, Destination, Source, Unreachable, read_whole
from tests.worlds.encrypted import PAGES, RANDOM, key
from tests.worlds.faulty_source import FaultySource, chunk_of

DIGEST = "ab" * 32
WHOLE = chunk_of(RANDOM)
KEY = chunk_key(WHOLE.hash)
AT_ONCE = Patience(pause=0.0)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[Directory]:
    folder = Directory(tmp_path)
    yield folder
    await folder.close()


@pytest.fixture
def store(folder: Directory, threads: ThreadPoolExecutor) -> Sealed:
    return Sealed(folder, [key("one")], "/keys", threads)


def _files(tmp_path: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


async def _read(store: Source, name: str, offset: int = 0, length: int = 1 << 30) -> bytes:
    return b"".join([bytes(piece) async for piece in store.read(name, offset, length)])


async def _brought(*sources: Source, data: bytes = RANDOM) -> bytes:
    target = bytearray(len(data))
    await Fetch(lambda chunk: sources, patience=AT_ONCE).bring(chunk_of(data), memoryview(target))
    return bytes(target)


async def test_what_lies_there_tells_neither_contents_nor_hashes(store: Sealed, tmp_path: Path) -> None:
    name = name_key("default", "small")
    await store.put(KEY, memoryview(RANDOM))
    await store.put(manifest_key(DIGEST), b'{"env": "hunter2"}')
    await store.put(signature_key(DIGEST), b"signature")
    await store.put("uploads/1.json", WHOLE.hash.encode())
    await store.put(name, b"a record")
    files = _files(tmp_path)
    assert files.pop(name) == b"a record"
    assert len(files) == 4 and {manifest_key(DIGEST), signature_key(DIGEST)} <= set(files)
    for path, data in files.items():
        assert WHOLE.hash not in path
        assert not [secret for secret in (RANDOM[:32], b"hunter2", b"signature", WHOLE.hash.encode()) if secret in data]
    for path, data in ((KEY, RANDOM), (manifest_key(DIGEST), b'{"env": "hunter2"}'), (name, b"a record")):
        assert await _read(store, path) == data
        assert await store.size(path) == len(data)


async def test_the_same_chunk_is_one_object_under_one_key_and_another_under_another(
    store: Sealed, folder: Directory, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    await store.put(KEY, RANDOM)
    await store.put(KEY, RANDOM)
    assert len(_files(tmp_path)) == 1
    await Sealed(folder, [key("two")], "/keys", threads).put(KEY, RANDOM)
    assert len(_files(tmp_path)) == 2


@pytest.mark.parametrize("data", [RANDOM, PAGES])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (1, 5000), (SEGMENT - 1, 2), (SEGMENT, SEGMENT), (3_000_000, 1 << 30), (5 << 20, 5)]
)
async def test_a_range_is_read_as_far_as_the_object_goes(store: Sealed, data: bytes, offset: int, length: int) -> None:
    await store.put(KEY, data)
    assert await _read(store, KEY, offset, length) == data[offset : offset + length]
    assert await _read(store, KEY, offset, 0) == b""


async def test_one_that_is_larger_than_what_is_asked_for_at_once(store: Sealed) -> None:
    """Of what is compressed nobody knows how much is needed: a part that compresses worse than the rest."""
    data = RANDOM[: 2 << 20] + bytes(8 << 20)
    await store.put(KEY, data)
    for length in (1 << 20, 2 << 20, 3 << 20, len(data)):
        assert await _read(store, KEY, 0, length) == data[:length]


async def test_what_is_not_there_is_absent(store: Sealed) -> None:
    for work in (_read(store, KEY), store.size(KEY), _read(store, manifest_key(DIGEST))):
        with pytest.raises(Absent, match="has no "):
            await work


@pytest.mark.parametrize("where", [0, 7, 9, 20, 30, 40, HEAD, HEAD + SEGMENT, HEAD + SEGMENT + 15, -1])
async def test_a_flipped_bit_is_told_and_the_next_source_is_asked(store: Sealed, tmp_path: Path, where: int) -> None:
    await store.put(KEY, RANDOM)
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(Altered, match="replace it from a whole copy"):
        await _brought(store)
    assert await _brought(store, FaultySource("other", [RANDOM], piece=1 << 20)) == RANDOM


async def test_objects_that_changed_places_are_told(store: Sealed, tmp_path: Path) -> None:
    other = chunk_of(RANDOM[::-1])
    await store.put(KEY, RANDOM)
    await store.put(chunk_key(other.hash), RANDOM[::-1])
    await store.put(manifest_key(DIGEST), b"{}")
    await store.put(manifest_key("cd" * 32), b"{ }")
    [one], [two] = ([tmp_path / name for name in store.names([each])] for each in (KEY, chunk_key(other.hash)))
    for a, b in ((one, two), (tmp_path / manifest_key(DIGEST), tmp_path / manifest_key("cd" * 32))):
        kept = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(kept)
    for each in (KEY, manifest_key(DIGEST)):
        with pytest.raises(Altered, match="was changed, or belongs under another name"):
            await _read(store, each)


@pytest.mark.parametrize("size", [0, 5, HEAD, HEAD + 7, HEAD + SEGMENT + 16, -16, -1])
async def test_one_that_was_cut_off_is_told_and_counts_as_not_there(store: Sealed, tmp_path: Path, size: int) -> None:
    await store.put(KEY, RANDOM)
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    path.write_bytes(path.read_bytes()[:size] if size else b"")
    assert await store.size(KEY) == -1
    with pytest.raises(Altered, match=r"is cut off|is not encrypted"):
        await _read(store, KEY)


async def test_one_in_clear_is_never_taken_from_an_encrypted_store(store: Sealed, folder: Directory) -> None:
    [name] = store.names([KEY])
    await folder.put(name, RANDOM)
    await folder.put(manifest_key(DIGEST), b"{}")
    for each in (KEY, manifest_key(DIGEST)):
        with pytest.raises(Altered, match="is not encrypted"):
            await _read(store, each)


async def test_another_key_finds_no_chunk_and_names_the_key_that_is_missing(
    store: Sealed, folder: Directory, threads: ThreadPoolExecutor
) -> None:
    await store.put(KEY, RANDOM)
    await store.put(manifest_key(DIGEST), b"{}")
    other = Sealed(folder, [key("two")], "/keys", threads)
    with pytest.raises(Denied, match=rf"is encrypted by key {key('one').id}, and /keys has {key('two').id}: bring that one there"):
        await read_whole(other, manifest_key(DIGEST), 100)
    with pytest.raises(Absent):
        await _read(other, KEY)


async def test_a_chunk_of_one_key_is_not_taken_under_the_name_of_another(
    store: Sealed, folder: Directory, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    await store.put(KEY, RANDOM)
    both = Sealed(folder, [key("two"), key("one")], "/keys", threads)
    [old], new = store.names([KEY]), both.names([KEY])
    [fresh] = new - {old}
    await folder.put(fresh, (tmp_path / old).read_bytes())
    with pytest.raises(Altered, match="belongs under another name"):
        await _read(both, KEY)


async def test_after_a_change_of_keys_both_are_read_and_all_is_put_anew(
    store: Sealed, folder: Directory, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    await store.put(KEY, RANDOM)
    await store.put(manifest_key(DIGEST), b"{}")
    reads = Sealed(folder, [key("two"), key("one")], "/keys", threads)
    assert await _read(reads, KEY) == RANDOM and await _read(reads, manifest_key(DIGEST)) == b"{}"
    writes = Sealed(folder, [key("two")], "/keys", threads)
    with pytest.raises(Absent):
        await writes.size(KEY)
    await writes.put(KEY, RANDOM)
    await writes.put(manifest_key(DIGEST), b"{}")
    assert {stored.key async for stored in reads.objects("chunks")} == reads.names([KEY])
    for name in store.names([KEY]):
        await reads.remove(name)
    assert await _read(writes, KEY) == RANDOM and await _read(writes, manifest_key(DIGEST)) == b"{}"
    assert len(_files(tmp_path)) == 2


async def test_the_key_that_had_the_last_chunk_is_tried_first(threads: ThreadPoolExecutor, folder: Directory) -> None:
    old = Sealed(folder, [key("one")], "/keys", threads)
    for data in (RANDOM, PAGES):
        await old.put(chunk_key(chunk_of(data).hash), data)

    class Watched(Sealed):
        def __init__(self, inner: Destination) -> None:
            super().__init__(inner, [key("two"), key("one")], "/keys", threads)

    asked: list[str] = []
    read = folder.read
    folder.read = lambda name, *rest: (asked.append(name), read(name, *rest))[1]  # type: ignore[method-assign]
    both = Watched(folder)
    assert await _brought(both) == RANDOM and len(asked) == 2
    assert await _brought(both, data=PAGES) == PAGES and len(asked) == 3


async def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(store: Sealed, threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    await store.put(KEY, RANDOM)
    [name] = store.names([KEY])
    source = FaultySource("wire", piece=100_000)
    source.contents = {name: (tmp_path / name).read_bytes()}
    asked: list[tuple[int, int]] = []
    read = source.read

    def breaking(name: str, offset: int, length: int):  # type: ignore[no-untyped-def]
        asked.append((offset, length))
        return read(name, offset, length)

    source.read = breaking  # type: ignore[method-assign]
    source.breaks_after = 1_500_000
    cut = Sealed(source, [key("one")], "/keys", threads)  # type: ignore[arg-type]
    assert await _brought(cut) == RANDOM
    begins = [offset for offset, length in asked if length > HEAD]
    assert begins[0] == 0 and begins == sorted(begins) and len(begins) == 4
    assert all((begin - HEAD) % (SEGMENT + 16) == 0 for begin in begins[1:])


async def test_a_slow_line_gives_a_segment_at_a_time(store: Sealed, threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Who reads leaves a source that sends nothing: the whole chunk must not be waited for."""
    await store.put(KEY, RANDOM)
    [name] = store.names([KEY])
    source = FaultySource("wire", piece=50_000)
    source.contents = {name: (tmp_path / name).read_bytes()}
    pieces = [len(piece) async for piece in Sealed(source, [key("one")], "/keys", threads).read(KEY, 0, CHUNK)]  # type: ignore[arg-type]
    assert sum(pieces) == len(RANDOM) and max(pieces) <= SEGMENT


async def test_a_source_that_cannot_be_reached_says_so(threads: ThreadPoolExecutor) -> None:
    source = FaultySource("wire")
    source.refuses = lambda name: Unreachable("it is away")
    with pytest.raises(Unreachable, match="it is away"):
        await _brought(Sealed(source, [key("one")], "/keys", threads))  # type: ignore[arg-type]


async def test_many_at_once(store: Sealed) -> None:
    parts = [RANDOM[at : at + 300_000] for at in range(0, 3_000_000, 300_000)]
    await asyncio.gather(*(store.put(chunk_key(chunk_of(part).hash), part) for part in parts))
    arrived: dict[str, bytes] = {}
    await Fetch(lambda chunk: [store]).bring_all(
        [chunk_of(part) for part in parts], lambda chunk, data: arrived.update({chunk.hash: bytes(data)})
    )
    assert [arrived[chunk_of(part).hash] for part in parts] == parts


async def test_readers_that_go_in_the_middle_spoil_nothing_for_others(store: Sealed) -> None:
    """What is decrypted for one lies in memory that was another's."""
    parts = [random.Random(seed).randbytes(3 << 20) for seed in range(6)]
    for part in parts:
        await store.put(chunk_key(chunk_of(part).hash), part)
    chance = random.Random(5)

    async def read(part: bytes) -> bytes:
        said = bytearray()
        async with contextlib.aclosing(store.read(chunk_key(chunk_of(part).hash), 0, len(part))) as pieces:
            async for piece in pieces:
                said += piece
        return bytes(said)

    async def leave(part: bytes) -> None:
        reading = asyncio.create_task(read(part))
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])

    for _ in range(8):
        _, *said = await asyncio.gather(asyncio.gather(*map(leave, parts)), *map(read, parts))
        assert said == parts
