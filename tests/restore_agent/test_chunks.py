"""The chunk store: what is put comes back, what is not whole is refused, and images that differ in one place share the rest."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpumem.filler.files import File
from restore_agent.snapshots.chunks import CHUNK, Chunk, ChunkStore, CorruptChunk, Lease, write_chunks
from restore_agent.snapshots.page_runs import PAGE, address_of
from tests.worlds.snapshots import ADDRESS, PID, pages

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore(tmp_path / "chunks")


def read(store: ChunkStore, chunk: Chunk) -> bytes:
    buffer = bytearray(chunk.size)
    store.read_into(chunk, memoryview(buffer))
    return bytes(buffer)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def test_what_is_put_comes_back_and_is_stored_once(store: ChunkStore, tmp_path: Path) -> None:
    content = noise(3 * PAGE)
    chunk = Lease(store).put(content)
    assert read(store, chunk) == content
    first = store.path(chunk.hash).stat().st_ino
    assert Lease(store).put(bytearray(content)) == chunk
    assert store.path(chunk.hash).stat().st_ino == first
    assert len(list((tmp_path / "chunks").glob("*/*"))) == 1


def test_a_torn_file_of_a_chunk_is_written_again(store: ChunkStore) -> None:
    chunk = Lease(store).put(noise(2 * PAGE))
    os.truncate(store.path(chunk.hash), PAGE)
    Lease(store).put(noise(2 * PAGE))
    assert read(store, chunk) == noise(2 * PAGE)


def test_a_chunk_that_a_disk_has_changed_is_written_again(store: ChunkStore) -> None:
    """Whoever takes a damaged snapshot again has most of its content again."""
    with store.lease() as lease:
        chunk = lease.put(PAGE * b"a")
        store.path(chunk.hash).write_bytes(PAGE * b"b")
        assert lease.put(PAGE * b"a") == chunk
        target = bytearray(chunk.size)
        store.read_into(chunk, memoryview(target))
    assert target == PAGE * b"a"


@pytest.mark.parametrize("how", ["missing", "torn", "longer", "flipped"])
def test_a_chunk_that_is_not_whole_is_refused_by_name(store: ChunkStore, how: str) -> None:
    chunk = Lease(store).put(noise(2 * PAGE))
    path = store.path(chunk.hash)
    if how == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"torn": content[:-1], "longer": content + b"x", "flipped": b"?" + content[1:]}[how])
    with pytest.raises(CorruptChunk, match=chunk.hash):
        read(store, chunk)


def test_a_chunk_that_is_made_shorter_as_it_is_read_is_refused_by_name(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.lease() as lease:
        chunk = lease.put(os.urandom(100_000))
    whole = File.read

    def torn(file: File, offset: int, target: memoryview, aligned: memoryview | None) -> None:
        os.truncate(store.path(chunk.hash), 5_000)
        whole(file, offset, target, aligned)

    monkeypatch.setattr(File, "read", torn)
    with pytest.raises(CorruptChunk, match=chunk.hash):
        store.read_into(chunk, memoryview(bytearray(chunk.size)))


def test_nothing_half_written_stays_where_the_disk_is_full(store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Lease(store).put(b"x" * PAGE)
    assert list((tmp_path / "chunks").glob("*/*")) == []


def test_into_unaligned_memory_and_of_another_size(store: ChunkStore) -> None:
    content = noise(4 * PAGE)
    chunk = Lease(store).put(content)
    buffer = bytearray(chunk.size + 1)
    start = 1 if address_of(memoryview(buffer)) % PAGE == 0 else 0
    store.read_into(chunk, memoryview(buffer)[start : start + chunk.size])
    assert bytes(buffer[start : start + chunk.size]) == content
    with pytest.raises(CorruptChunk):
        store.read_into(Chunk(chunk.hash, chunk.size - PAGE), memoryview(buffer)[: chunk.size - PAGE])


def test_around_the_page_cache_and_from_it(store: ChunkStore) -> None:
    """Both give the same; what is read around it is not in it afterwards."""
    chunks, _ = write_chunks(Lease(store), [pages(noise(6 * MIB))])
    whole = bytearray(CHUNK + PAGE)
    aligned = memoryview(whole)[-address_of(memoryview(whole)) % PAGE :]
    for chunk in chunks:
        path = store.path(chunk.hash)
        expected = path.read_bytes()
        store.read_into(chunk, aligned[: chunk.size])
        assert aligned[: chunk.size] == expected
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        if resident(path):
            pytest.skip(f"needs a disk: what is in {path.parent} stays in memory (tmpfs)")
        store.read_into(chunk, aligned[: chunk.size])
        assert aligned[: chunk.size] == expected
        assert resident(path) == 0


def resident(path: Path) -> int:
    """Pages in the page cache."""
    out = subprocess.run(["fincore", "--noheadings", "--output", "PAGES", path], capture_output=True, text=True, check=True).stdout
    return int(out)


def test_chunks_are_the_runs_one_behind_the_other_and_the_index_says_where_they_belong(store: ChunkStore) -> None:
    runs = [pages(noise(5 * MIB, 1)), pages(noise(3 * PAGE, 2), ADDRESS + (64 << 20)), pages(noise(MIB, 3), ADDRESS + (128 << 20))]
    chunks, index = write_chunks(Lease(store), runs)
    assert b"".join(read(store, chunk) for chunk in chunks) == b"".join(bytes(run.data) for run in runs)
    assert [(run.pid, run.address, run.length) for run in index] == [(PID, run.address, run.length) for run in runs]
    assert all(chunk.size <= CHUNK for chunk in chunks)


def test_no_runs_are_no_chunks(store: ChunkStore) -> None:
    assert write_chunks(Lease(store), []) == ([], [])


def test_images_fall_back_into_step_at_the_next_boundary(store: ChunkStore) -> None:
    """A megabyte more at the beginning, a byte that differs in the middle: all other chunks are the same."""
    content = noise(32 * MIB)
    one, _ = write_chunks(Lease(store), [pages(content)])
    other, _ = write_chunks(Lease(store), [pages(noise(MIB, 9), ADDRESS - MIB), pages(content)])
    assert len(one) >= 8
    assert [chunk.hash for chunk in other[1:]] == [chunk.hash for chunk in one]
    changed = bytearray(content)
    changed[17 * MIB] ^= 1
    third, _ = write_chunks(Lease(store), [pages(bytes(changed))])
    assert len({chunk.hash for chunk in third} - {chunk.hash for chunk in one}) == 1


def test_collecting_removes_what_nobody_uses(store: ChunkStore, tmp_path: Path) -> None:
    with store.lease() as lease:
        kept, gone = lease.put(noise(PAGE, 1)), lease.put(noise(2 * PAGE, 2))
    torn = store.path(gone.hash).with_name("tmp-of-a-crash")
    torn.write_bytes(b"half")
    half = store.path(kept.hash).with_name(f"{kept.hash}.of-a-crash")
    half.write_bytes(b"half")
    assert store.collect({kept.hash})
    assert [path.name for path in (tmp_path / "chunks").glob("*/*")] == [kept.hash]


def test_what_is_leased_stays_until_the_last_lease_ends(store: ChunkStore) -> None:
    one, other = Lease(store), Lease(store)
    chunk = one.put(noise(PAGE))
    assert other.put(noise(PAGE)) == chunk
    one.release()
    one.release()
    assert not store.collect(set())
    assert store.has(chunk)
    other.release()
    assert store.collect(set())
    assert not store.has(chunk)


def test_no_chunk_is_lost_between_writers_and_collectors(store: ChunkStore) -> None:
    """Writers store the same few chunks again and again, collectors remove all that nobody holds: what a writer was given is there."""
    ended = threading.Event()

    def collect() -> None:
        while not ended.is_set():
            store.collect(set())

    def write(seed: int) -> list[str]:
        lost = []
        for turn in range(60):
            with store.lease() as lease:
                chunks = [lease.put(noise(PAGE, (seed + turn + i) % 5)) for i in range(3)]
                lost += [chunk.hash for chunk in chunks if not store.has(chunk)]
        return lost

    with ThreadPoolExecutor(6) as pool:
        collectors = [pool.submit(collect) for _ in range(2)]
        try:
            assert [lost for writer in [pool.submit(write, seed) for seed in range(4)] for lost in writer.result()] == []
        finally:
            ended.set()
        for collector in collectors:
            collector.result()
