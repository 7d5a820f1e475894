"""The fill: pages on their way into a process, as they arrive, by many threads; what came there is compared with the image."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from restore_agent.pages.fill import Arena, FillError
from restore_agent.pages.images import split
from restore_agent.snapshots.chunks import Chunk, ChunkStore, CorruptChunk, Lease, write_chunks
from restore_agent.snapshots.page_runs import PAGE, write_index
from tests.worlds.comparison import Compared, Different, compare
from tests.worlds.images import ANONYMOUS, PID, READ, WRITE, scattered, write_image

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
        content = scattered(SIZE)
        folder = tmp_path / "images"
        write_image(folder, {address: (content, READ | WRITE, ANONYMOUS), kept: (b"k" * 65536, READ, ANONYMOUS)})
        store = ChunkStore(tmp_path / "chunks")
        chunks, index = write_chunks(Lease(store), split(folder))
        write_index(tmp_path / "index", index)
        yield Target(process.pid, address, kept, content, folder, store, chunks, (tmp_path / "index").read_bytes())
    finally:
        process.kill()
        process.communicate()


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
