"""Pages on their way: from an image into chunks, from chunks into memory and at the same time into a process, and compared there."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc, criu_pb2

from restore_agent.pages import images
from restore_agent.pages.fill import Arena, FillError
from restore_agent.pages.images import split
from restore_agent.snapshots.chunks import Chunk, ChunkStore, CorruptChunk, write_chunks
from restore_agent.snapshots.page_runs import PAGE, read_index, write_index
from restore_agent.snapshots.store import Catalog
from tests.worlds.agent import Agent
from tests.worlds.comparison import Compared, Different, compare
from tests.worlds.leftovers import left_behind, nothing_left

PID = 7  # in the image
SIZE = 40 << 20
TARGET = """
import ctypes, mmap, sys
large, small = mmap.mmap(-1, {size}, flags=0x22), mmap.mmap(-1, 65536, flags=0x22)
small[:] = b"k" * 65536
print(*(ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (large, small)), flush=True)
sys.stdin.read()
"""


@dataclass
class Target:
    """A process that waits with memory of no content, as CRIU leaves one, and a page store with an image of it."""

    pid: int
    address: int
    kept: int  # the address of what CRIU would restore
    content: bytes
    images: Path
    store: ChunkStore
    chunks: list[Chunk]
    index: bytes

    def poke(self, address: int) -> None:
        with Path(f"/proc/{self.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(address)
            old = memory.read(1)
            memory.seek(address)
            memory.write(bytes([old[0] ^ 1]))

    def memory(self) -> bytes:
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(self.address)
            return memory.read(SIZE)

    def compare(self, arena: Arena) -> Compared:
        return compare(arena, self.images, {PID: self.pid})


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    process = subprocess.Popen([sys.executable, "-c", TARGET.format(size=SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address, kept = map(int, process.stdout.readline().split())
        content = scattered()
        folder = tmp_path / "images"
        folder.mkdir()
        write_image(folder, address, kept, content)
        store = ChunkStore(tmp_path / "chunks")
        chunks, index = write_chunks(store, split(folder))
        write_index(tmp_path / "index", index)
        yield Target(process.pid, address, kept, content, folder, store, chunks, (tmp_path / "index").read_bytes())
    finally:
        process.kill()
        process.communicate()


def scattered() -> bytes:
    """Pages of content and runs of zeros, long and short."""
    source, content = random.Random(3), bytearray()
    while len(content) < SIZE:
        content += source.randbytes(source.choice([1, 5, 300, 900]) * PAGE)
        content += bytes(source.choice([1, 15, 16, 40, 700]) * PAGE)
    return bytes(content[:SIZE])


def write_image(folder: Path, address: int, kept: int, content: bytes) -> None:
    """As CRIU does: the present pages, an entry for 256 of them at most."""
    anonymous = 1 << 0 | 1 << 9
    mappings = [(address, SIZE, 3), (kept, 65536, 1)]
    vmas = [criu_pb2.Vma(start=start, end=start + size, prot=prot, status=anonymous) for start, size, prot in sorted(mappings)]
    mm = criu_pb2.Mm(vmas=vmas)
    entries, pages = [criu_pb2.PagemapHead(pages_id=1).SerializeToString()], b""
    for start, data in sorted([(address, content), (kept, b"k" * 65536)]):
        for at in range(0, len(data), 256 * PAGE):
            part = data[at : at + 256 * PAGE]
            entry = criu_pb2.PagemapEntry(vaddr=start + at, compat_nr_pages=len(part) // PAGE, flags=images._PRESENT)
            entries.append(entry.SerializeToString())
            pages += part
    images._write(folder / f"mm-{PID}.img", images._MM, [mm.SerializePartialToString()])
    images._write(folder / f"pagemap-{PID}.img", images._PAGEMAP, entries)
    (folder / "pages-1.img").write_bytes(pages)


async def test_long_zeros_are_left_out_and_short_ones_are_not(target: Target) -> None:
    arena = await Arena.load(target.store, target.chunks, target.index)
    runs = arena.runs()
    assert arena.size < 0.8 * SIZE
    rebuilt, end = bytearray(SIZE), 0
    for run in runs:
        assert run.pid == PID
        at = run.address - target.address
        assert bytes(run.data) == target.content[at : at + run.length]
        assert bytes(run.data[-PAGE:]) != bytes(PAGE), "a run does not end in zeros"
        assert at == end or at - end >= PAGE
        rebuilt[at : at + run.length] = run.data
        end = at + run.length
    assert bytes(rebuilt) == target.content
    inside = [run for run in runs if any(not any(run.data[i : i + PAGE]) for i in range(PAGE, run.length - PAGE, PAGE))]
    assert inside, "short runs of zeros stay"


async def test_a_whole_arena_is_filled_and_compared(target: Target) -> None:
    arena = await Arena.load(target.store, target.chunks, target.index)
    assert arena.whole
    await arena.fill({PID: target.pid})
    assert target.memory() == target.content
    found = target.compare(arena)
    assert found.filled == arena.size // PAGE
    assert found.kept == 16


@pytest.mark.parametrize("which", ["filled", "kept", "left out"])
async def test_a_changed_page_is_found(which: str, target: Target) -> None:
    arena = await Arena.load(target.store, target.chunks, target.index)
    await arena.fill({PID: target.pid})
    zeros = target.content.index(bytes(40 * PAGE)) // PAGE * PAGE + 20 * PAGE
    address = {"filled": arena.runs()[3].address + 17, "kept": target.kept + 40_000, "left out": target.address + zeros}[which]
    target.poke(address)
    with pytest.raises(Different, match=f"{address // PAGE * PAGE:#x}"):
        target.compare(arena)


async def test_a_fill_takes_each_chunk_as_it_arrives(target: Target) -> None:
    """In any order; and it is over when the last has come, for every process that waits."""
    arena = Arena(target.chunks, target.index)
    gates = {chunk.hash: threading.Event() for chunk in target.chunks}
    assert len(gates) > 4

    def read(chunk: Chunk, memory: memoryview) -> None:
        assert gates[chunk.hash].wait(20)
        target.store.read_into(chunk, memory)

    reading = asyncio.create_task(arena.read(read))
    fills = [asyncio.create_task(arena.fill({PID: target.pid})) for _ in range(2)]
    order = [number for number in range(len(target.chunks)) if number != 1]
    random.Random(1).shuffle(order)
    for number in order:
        gates[target.chunks[number].hash].set()
        async with asyncio.timeout(20):
            while not first_page_there(target, arena, number):
                await asyncio.sleep(0.001)
    assert not any(fill.done() for fill in fills)
    assert not arena.whole
    gates[target.chunks[1].hash].set()
    await asyncio.gather(reading, *fills)
    assert target.memory() == target.content
    target.compare(arena)


def first_page_there(target: Target, arena: Arena, number: int) -> bool:
    """Whether the process has the first page of a chunk."""
    offset = sum(chunk.size for chunk in target.chunks[:number])
    for run in arena.runs():
        if offset < run.length:
            at = run.address + offset - target.address
            return target.memory()[at : at + PAGE] == target.content[at : at + PAGE]
        offset -= run.length
    raise AssertionError(number)


async def test_a_chunk_that_does_not_arrive_fails_the_fill_with_its_reason(target: Target) -> None:
    path = target.store.path(target.chunks[-1].hash)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    arena = Arena(target.chunks, target.index)
    reading = asyncio.create_task(arena.read(target.store.read_into))
    with pytest.raises(CorruptChunk, match=target.chunks[-1].hash):
        await asyncio.wait_for(arena.fill({PID: target.pid}), 20)
    with pytest.raises(CorruptChunk):
        await reading


async def test_a_fill_that_is_given_up_writes_nothing_more(target: Target) -> None:
    arena = Arena(target.chunks, target.index)
    gate = threading.Event()

    def read(chunk: Chunk, memory: memoryview) -> None:
        assert gate.wait(20)
        target.store.read_into(chunk, memory)

    reading = asyncio.create_task(arena.read(read))
    fill = asyncio.create_task(arena.fill({PID: target.pid}))
    await asyncio.wait([fill], timeout=0.05)
    fill.cancel()
    await asyncio.wait([fill], timeout=20)
    assert fill.cancelled()
    gate.set()
    await reading
    assert target.memory() == bytes(SIZE)


async def test_a_process_that_is_gone_fails_the_fill(target: Target) -> None:
    arena = await Arena.load(target.store, target.chunks, target.index)
    os.kill(target.pid, 9)
    with pytest.raises(FillError, match="cannot fill the page at 0x"):
        async with asyncio.timeout(20):
            while True:  # until the kernel has taken its memory
                await arena.fill({PID: target.pid})
    with pytest.raises(FillError, match=r"pid \[7\]"):
        await arena.fill({8: target.pid})


async def test_chunks_are_read_around_the_page_cache_and_from_it(target: Target) -> None:
    """Both give the same; what is read around it is not in it afterwards."""
    for cached in (True, False):
        for chunk in target.chunks:
            path = target.store.path(chunk.hash)
            if cached:
                path.read_bytes()
            else:
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
                if resident(path):
                    pytest.skip(f"needs a disk: what is in {path.parent} stays in memory (tmpfs)")
        arena = await Arena.load(target.store, target.chunks, target.index)
        await arena.fill({PID: target.pid})
        assert target.memory() == target.content
    assert [resident(target.store.path(chunk.hash)) for chunk in target.chunks] == [0] * len(target.chunks)


def resident(path: Path) -> int:
    """Pages in the page cache."""
    out = subprocess.run(["fincore", "--noheadings", "--output", "PAGES", path], capture_output=True, text=True, check=True).stdout
    return int(out)


async def test_a_chunk_into_unaligned_memory_and_one_of_another_size(target: Target) -> None:
    chunk = target.chunks[0]
    buffer = bytearray(chunk.size + 1)
    target.store.read_into(chunk, memoryview(buffer)[1:])
    assert bytes(buffer[1:]) == target.store.path(chunk.hash).read_bytes()
    with pytest.raises(CorruptChunk):
        target.store.read_into(Chunk(chunk.hash, chunk.size - PAGE), memoryview(buffer)[: chunk.size - PAGE])


def test_what_was_only_read_of_a_mapped_file_is_not_in_the_image(captured: Path) -> None:
    """The server maps a file of 1 MiB privately, reads all of it and writes two pages; its child has the same mapping."""
    snapshot = Catalog(captured).get("default", "small")
    runs = read_index((snapshot.directory / "pages.index").read_bytes())
    found = []
    for mm in (snapshot.directory / "images").glob("mm-*.img"):
        (raw,) = images._read(mm, images._MM)
        for vma in criu_pb2.Mm.FromString(raw).vmas:
            if vma.status & images._FILE_PRIVATE and vma.prot == 3 and vma.end - vma.start == 1 << 20:
                inside = [run for run in runs if f"mm-{run.pid}" == mm.stem and vma.start <= run.address < vma.end]
                found.append(sum(run.length for run in inside))
    assert found == [2 * PAGE, 2 * PAGE]


@pytest.fixture
async def comparing(state: Path) -> AsyncIterator[Agent]:
    """An agent that compares every page of what it restores."""
    log = state.parent / "agent.log"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.worlds.compared", "agent", "--state", str(state), stderr=log.open("wb")
    )
    try:
        async with grpc.aio.insecure_channel(f"unix:{state / 'agent.sock'}") as channel:
            async with asyncio.timeout(20):
                await channel.channel_ready()
            yield Agent(process, state, agent_pb2_grpc.AgentStub(channel))
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)
    await nothing_left(state)
    assert left_behind(state) == []


async def test_every_page_of_a_restored_tree_is_the_image_s(comparing: Agent) -> None:
    """Two processes; while the image comes from disk, from memory, and twice at once."""
    for ids in (["disk"], ["memory"], ["one", "two"]):
        for answer in await asyncio.gather(*(comparing.restore("small", request_id=name + secrets.token_hex(2)) for name in ids)):
            assert answer.replica.origin == pb.ORIGIN_RESTORED, answer.fallback_detail
    lines = [line for line in (comparing.state.parent / "agent.log").read_text().splitlines() if line.startswith("compared ")]
    assert len(lines) == 4
    for line in lines:
        filled, kept, _ = (int(word) for word in line.split() if word.isdigit())
        assert filled * PAGE > 17 << 20, "8 MiB of content in each of two processes, and a sparse megabyte"
        assert kept > 100
