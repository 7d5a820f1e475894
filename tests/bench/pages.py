"""Pages from disk into a process: beside the disk's own time for the same bytes, and beside reading everything before anything is copied.

The disk's own time is that of sixteen readers around the page cache into memory that was touched before, with nothing done to the bytes.
All ways are measured in turn, each from files that are not cached and with free memory that was touched just before, and each from the making of the sandbox to the process's first answer;
`all in memory` is the same restore with nothing to read, so what it takes is what no disk could save.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from restore_agent import oracle
from restore_agent.chunks import ChunkStore
from restore_agent.manifest import EngineRecord
from restore_agent.native import zero_pages
from restore_agent.pages import Arena
from restore_agent.sandbox import Sandbox
from tests.bench.figures import Figure
from tests.bench.restore import BIG, PORT, Bench, Dumped, prepared, spread

ROUNDS = 7
READERS = 16
PIECE = 4 << 20
_MADV_POPULATE_WRITE = 23


async def main() -> list[Figure]:
    async with prepared() as bench:
        return [*await from_disk(bench), zeros()]


async def from_disk(bench: Bench) -> list[Figure]:
    program = bench.work / "big.py"
    program.write_text(BIG)
    record = EngineRecord(command=(sys.executable, str(program)), env={"PATH": os.environ["PATH"]}, port=PORT, health_path="/")
    dumped = await bench.dump("big", record, "/", "")
    store = ChunkStore(bench.work / "big" / "chunks")
    paths = [store.path(chunk.hash) for chunk in dumped.arena.chunks]
    index = (dumped.ours / "pages.index").read_bytes()

    def fresh() -> Arena:
        return Arena(dumped.arena.chunks, index)

    async def arriving() -> float:
        arena = fresh()
        reading = asyncio.create_task(arena.read(store.read_into))
        seconds = await restored(bench, dumped, lambda sandbox: arena.fill(sandbox.host_pids()))
        await reading
        return seconds

    async def read_first() -> float:
        arena = fresh()
        reading = asyncio.create_task(arena.read(store.read_into))

        async def fill(sandbox: Sandbox) -> None:
            await reading
            await arena.fill(sandbox.host_pids())

        return await restored(bench, dumped, fill)

    async def in_memory() -> float:
        return await restored(bench, dumped, lambda sandbox: dumped.arena.fill(sandbox.host_pids()))

    async def staged() -> float:
        began = time.monotonic()
        await fresh().read(store.read_into)
        return time.monotonic() - began

    memory = touched(dumped.arena.size)
    ways: dict[str, Callable[[], Awaitable[float]]] = {
        "disk": lambda: asyncio.to_thread(disk_seconds, paths, memory),
        "staged": staged,
        "arriving": arriving,
        "read first": read_first,
        "in memory": in_memory,
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS + 1):
        for way, measured in ways.items():
            uncache(paths)
            touched(2 * dumped.arena.size + (1 << 30)).release()  # what was free for long has gone back to the hypervisor
            taken[way].append(await measured())
    taken = {way: seconds[1:] for way, seconds in taken.items()}
    disk, staging, ours, former, floor = (statistics.median(taken[way]) for way in ways)
    size = dumped.arena.size / 1e9
    return [
        Figure("2 GiB process: the disk's own rate", size / disk, "GB/s", detail=f"{disk:.2f} s; {spread(taken['disk'])}"),
        Figure("disk → memory, verified ÷ disk's own time", staging / disk, "×", detail=spread(taken["staged"])),
        Figure("disk → process, answered ÷ disk's own time", ours / disk, "×", detail=spread(taken["arriving"])),
        Figure("the same, all read before the fill ÷ disk's own time", former / disk, "×", detail=spread(taken["read first"])),
        Figure("the same, all in memory ÷ disk's own time", floor / disk, "×", detail=spread(taken["in memory"])),
    ]


async def restored(bench: Bench, dumped: Dumped, fill: Callable[[Sandbox], Awaitable[object]]) -> float:
    """Seconds to the first answer of a restored process."""

    async def hugely(sandbox: Sandbox) -> None:
        with bench.huge.on():
            await fill(sandbox)

    async with contextlib.AsyncExitStack() as stack:
        began = time.monotonic()
        engine = await bench.restore(dumped, dumped.ours, hugely, stack)
        seconds = time.monotonic() - began
        await oracle.prove(engine, dumped.canary)
        return seconds


def disk_seconds(paths: Sequence[Path], memory: memoryview) -> float:
    """The disk's own time to read these files, each once, all of each. `memory`: as large as they are, touched, on a page's boundary."""

    def read(path: Path, offset: int, target: memoryview) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            while len(target):
                count = os.preadv(fd, [target], offset)
                if not count:
                    raise EOFError(f"{path} became shorter")
                target, offset = target[count:], offset + count
        finally:
            os.close(fd)

    with ThreadPoolExecutor(READERS) as pool:
        began, at, reads = time.monotonic(), 0, []
        for path in paths:
            size = path.stat().st_size // 4096 * 4096  # O_DIRECT reads whole blocks
            for offset in range(0, size, PIECE):
                length = min(PIECE, size - offset)
                reads.append(pool.submit(read, path, offset, memory[at : at + length]))
                at += length
        for done in reads:
            done.result()
        return time.monotonic() - began


def touched(size: int) -> memoryview:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(_MADV_POPULATE_WRITE)
    return memoryview(memory)


def uncache(paths: Sequence[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def zeros() -> Figure:
    """How fast zeros are found, in an image that is half zeros."""
    memory = touched(256 << 20)
    for at in range(0, len(memory), 2 << 20):
        memory[at : at + (1 << 20)] = os.urandom(1 << 20)
    rates = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        found = zero_pages(memory)
        rates.append(len(memory) / (time.monotonic() - began) / 1e9)
        assert sum(found) == len(found) // 2
    return Figure("pages looked through for zeros", statistics.median(rates), "GB/s", detail="half of them zeros; one thread")
