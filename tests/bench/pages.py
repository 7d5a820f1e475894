"""Pages from disk into a process: beside the disk's own time for the same bytes, and beside reading everything before anything is copied.

The disk's own time is that of sixteen readers around the page cache into memory that was touched before, with nothing done to the bytes.
All ways are measured in turn, each from files that are not cached, with free memory that was touched just before, and from the making of
the sandbox to the restored process. `all in memory` is the same restore with nothing to read: what it takes is what no disk could save.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from restore_agent.engine.canary import prove_canary
from restore_agent.pages.fill import Arena
from restore_agent.pages.native import zero_pages
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.chunks import Chunk, ChunkStore
from restore_agent.snapshots.manifest import EngineRecord
from restore_agent.snapshots.page_runs import PageRun
from tests.bench.figures import Figure
from tests.bench.restore import BIG, PORT, Bench, Dumped, prepared, spread

ROUNDS = 5
READERS = 16
PIECE = 4 << 20
_MADV_POPULATE_WRITE = 23


TARGET = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]) + (2 << 20), flags=0x22)
memory.madvise(mmap.MADV_HUGEPAGE)
print(-(-ctypes.addressof(ctypes.c_char.from_buffer(memory)) // (2 << 20)) * (2 << 20), flush=True)
sys.stdin.read()
"""


async def main() -> list[Figure]:
    async with prepared() as bench:
        return [*await from_disk(bench), *await by_threads(), zeros()]


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
    disk = statistics.median(taken["disk"])

    def beside(name: str, way: str) -> Figure:
        """Each round's beside the disk's own time in that round: a noisy machine is noisy for both."""
        ratios = [ours / own for ours, own in zip(taken[way], taken["disk"], strict=True)]
        return Figure(f"{name} ÷ disk's own time", statistics.median(ratios), "×", detail=spread(taken[way]))

    return [
        Figure("2 GiB process: the disk's own rate", dumped.arena.size / disk / 1e9, "GB/s", detail=spread(taken["disk"])),
        beside("disk → memory, verified", "staged"),
        beside("disk → restored process", "arriving"),
        beside("the same, all read before the fill", "read first"),
        beside("the same, all in memory", "in memory"),
    ]


async def restored(bench: Bench, dumped: Dumped, fill: Callable[[Sandbox], Awaitable[object]]) -> float:
    """Seconds to a restored process, which then proves itself."""

    async def hugely(sandbox: Sandbox) -> None:
        with bench.huge.on():
            await fill(sandbox)

    async with contextlib.AsyncExitStack() as stack:
        began = time.monotonic()
        engine = await bench.restore(dumped, dumped.ours, hugely, stack)
        seconds = time.monotonic() - began
        await prove_canary(engine, dumped.canary)
        return seconds


async def by_threads(size: int = 1 << 30) -> list[Figure]:
    """Fills with so many threads, of one process and of four that share the pages; no CRIU, no root."""
    figures = []
    for processes in (1, 4):
        for threads in [count for count in (1, 2, 4, 8, 16, 32) if count <= 2 * (os.cpu_count() or 1)]:
            rates = [await filled(size, processes, threads) for _ in range(ROUNDS)]
            name = f"{processes} process{'es' * (processes > 1)} filled by {threads} thread{'s' * (threads > 1)}"
            detail = f"median of {len(rates)}, {min(rates):.1f} to {max(rates):.1f}; {size >> 30} GiB, huge pages"
            figures.append(Figure(name, statistics.median(rates), "GB/s", detail=detail))
    return figures


async def filled(size: int, processes: int, threads: int) -> float:
    """GB/s of one fill of fresh processes."""
    share = size // processes
    command = [sys.executable, "-c", TARGET, str(share)]
    with contextlib.ExitStack() as stack:
        targets = []
        for _ in range(processes):
            target = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(target.communicate)
            stack.callback(target.kill)
            assert target.stdout is not None
            targets.append((target.pid, int(target.stdout.readline())))
        runs = [PageRun(pid, address + at, 1 << 20) for pid, address in targets for at in range(0, share, 1 << 20)]
        arena = Arena([Chunk("", PIECE)] * (size // PIECE), b"".join(map(bytes, runs)))
        await arena.read(lambda _, memory: memory.__setitem__(slice(None), b"t" * PIECE))
        touched(size + (1 << 29)).release()
        seconds = await arena.fill({pid: pid for pid, _ in targets}, threads)
        return size / seconds / 1e9


def disk_seconds(paths: Sequence[Path], memory: memoryview, readers: int = READERS, piece: int = PIECE) -> float:
    """The disk's own time to read these files, each once, all of each. `memory`: as large as they are, touched, on a page's boundary.

    So many readers ask for a piece (bytes) each at a time.
    """

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

    with ThreadPoolExecutor(readers) as pool:
        began, at, reads = time.monotonic(), 0, []
        for path in paths:
            size = path.stat().st_size // 4096 * 4096  # O_DIRECT reads whole blocks
            for offset in range(0, size, piece):
                length = min(piece, size - offset)
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
