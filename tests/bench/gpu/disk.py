"""From the disk into memory of a GPU and of the host, beside the disk itself: `python -m tests.bench.gpu.disk MODEL [--seconds S]`.

The disk itself: many readers around the page cache (O_DIRECT) into memory that was touched before, with nothing done to the bytes, at the
best of several depths; and fio, where it is installed. Beside it, in turn and in the same run, with the files out of the page cache:

- a model's weights from its files into memory that gpumem lends, by its server and its filler, each chunk verified on the way. Another
  process then attaches the region and compares every chunk with the files'. Each round is a namespace of its own, to which nothing that
  the arena still has of the last one is lent.
- an image's pages from the chunk store into memory, as staging reads them, verified on the way, and once more afterwards. Memory that was
  free for long has been touched before: a virtual machine's first touch of it is slow, and no disk's.

What was counted by the kernel as read from the disk is a figure, too. Writes `tests/bench/results/disk-GPU-MODEL.json`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3
from zerowake_proto import gpumem_pb2

from gpumem.checkpoint.safetensors import read_checkpoint
from gpumem.client.control import Control
from restore_agent.pages.fill import Arena
from restore_agent.snapshots.chunks import CHUNK, ChunkStore, write_chunks
from restore_agent.snapshots.page_runs import PAGE, Pages
from tests.bench.figures import Figure
from tests.bench.gpu.run import Run, begun, console, control
from tests.bench.gpu.sizes import GIB, Needs, Room
from tests.bench.pages import disk_seconds, touched, uncache
from tests.worlds.device import World, check

SECONDS = 540.0
ROUNDS = 7
WAYS = ((4, 16 << 20), (16, 4 << 20), (32, 1 << 20), (64, 1 << 20))  # readers, and bytes that each asks for at a time
PROBED = 4 << 30  # bytes at most of the files by which the best of them is found
IMAGE = 4 << 30  # bytes of pages at most: no more than the model has
ARENA = 4  # GiB: a few moves of half a gigabyte, and far less than a model


class Bench:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.files = sorted(run.model.glob("*.safetensors"))
        self.store = ChunkStore(run.folder / "chunks")
        self.rates: dict[str, list[float]] = defaultdict(list)  # bytes a second, of each round
        self.counted: dict[str, list[float]] = defaultdict(list)  # bytes that the kernel has read from the disk ÷ those of the files
        self.compared = 0
        self.longest = 0.0  # seconds that a round took
        self.fio = shutil.which("fio")

    async def prepare(self) -> None:
        await asyncio.to_thread(self._write)
        self.device = (await control(lambda c: c.status())).devices[0].identity
        self.memory = await asyncio.to_thread(touched, size_of(self.files))

    def _write(self) -> None:
        """The image; and all of it to the disk, so that the page cache can let go of it."""
        chance = random.Random(14)
        size = min(IMAGE, self.run.shape.bytes) // PAGE * PAGE
        pages = (Pages(1, at, memoryview(chance.randbytes(min(CHUNK, size - at)))) for at in range(0, size, CHUNK))
        with self.store.lease() as lease:
            self.chunks, index = write_chunks(lease, pages)
        self.index = b"".join(map(bytes, index))
        self.image = [self.store.path(chunk.hash) for chunk in self.chunks]
        self.checkpoint = read_checkpoint(self.run.model)
        os.sync()

    async def probe(self) -> None:
        files = [path for at, path in enumerate(self.files) if size_of(self.files[: at + 1]) <= PROBED] or self.files[:1]
        rates = {way: [await self._disk(files, way) for _ in range(2)] for way in WAYS}
        self.way = max(rates, key=lambda way: max(rates[way]))
        for (readers, piece), found in rates.items():
            console.print(f"{readers} readers of {piece >> 20} MiB: {', '.join(f'{rate / 1e9:.2f}' for rate in found)} GB/s")

    async def round(self, number: int) -> None:
        begin = time.monotonic()
        works: list[tuple[str, Callable[[], Awaitable[float]]]] = [
            ("disk, weights", lambda: self._disk(self.files, self.way)),
            ("weights", functools.partial(self._fill, number)),
            ("disk, image", lambda: self._disk(self.image, self.way)),
            ("image", self._staged),
        ]
        if self.fio:
            works.append(("fio", self._fio))
        for name, work in works if number % 2 else reversed(works):
            self.rates[name].append(await work())
        self.longest = max(self.longest, time.monotonic() - begin)
        self.run.figures[:] = self.figures()

    async def _disk(self, files: Sequence[Path], way: tuple[int, int]) -> float:
        await asyncio.to_thread(uncache, files)
        return size_of(files) / await asyncio.to_thread(disk_seconds, files, self.memory, *way)

    async def _fill(self, number: int) -> float:
        """Into a region that was not there, of nobody's chunks; and whoever attaches it finds the files' bytes."""
        checkpoint = self.checkpoint
        pid = (await control(lambda c: c.status())).devices[0].filler_pid
        socket = await control(lambda c: c.tenant(f"round-{number}"))
        await asyncio.to_thread(uncache, self.files)
        async with Control.connected(socket) as tenant:
            before, begin = read_from_disk(pid), time.monotonic()
            filled = await tenant.fill(checkpoint.layout, checkpoint.parts, self.device)
            seconds = time.monotonic() - begin
            self.counted["weights"].append((read_from_disk(pid) - before) / filled.from_files)
            await asyncio.to_thread(self._compare, socket, filled.id)
            await tenant.evict(gpumem_pb2.RegionRef(device=self.device, id=filled.id))
        return filled.from_files / seconds

    def _compare(self, socket: Path, region: bytes) -> None:
        world = World(self.run.folder, self.device)
        operators, world.socket = world.socket, socket
        with world.engine() as engine:
            engine.ask("attach", region=region.hex())
            found = engine.ask("hashes", sizes=[chunk.size for chunk in self.checkpoint.layout.chunks])
        check(found == [chunk.hash.hex() for chunk in self.checkpoint.layout.chunks], "a region holds what the files hold")
        self.compared += len(found)
        world.socket = operators
        world.until(lambda: not any(each.leases for each in world.status().regions), "the region is nobody's any more")

    async def _staged(self) -> float:
        await asyncio.to_thread(uncache, self.image)
        touched(size_of(self.image) + GIB).release()  # what was free for long has gone back to the hypervisor
        before, begin = read_from_disk(os.getpid()), time.monotonic()
        arena = await Arena.load(self.store, self.chunks, self.index)
        seconds = time.monotonic() - begin
        self.counted["image"].append((read_from_disk(os.getpid()) - before) / arena.size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            hashes = list(pool.map(lambda chunk: blake3(arena.chunk(chunk.hash) or b"").hexdigest(), self.chunks))
        check(hashes == [chunk.hash for chunk in self.chunks], "an image in memory is the one on the disk")
        return arena.size / seconds

    async def _fio(self) -> float:
        await asyncio.to_thread(uncache, self.files)
        command = ["--name=read", "--readonly", "--rw=read", "--direct=1", "--ioengine=io_uring", "--iodepth=32", "--bs=1M"]
        files = ["--file_service_type=sequential", f"--filename={':'.join(map(str, self.files))}", "--output-format=json"]
        process = await asyncio.create_subprocess_exec(self.fio or "", *command, *files, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        return float(json.loads(out[out.index(b"{") :])["jobs"][0]["read"]["bw_bytes"])

    def figures(self) -> list[Figure]:
        """Of the rounds so far."""
        readers, piece = self.way
        own = [max(both) for both in zip(self.rates["disk, weights"], self.rates.get("fio", self.rates["disk, weights"]), strict=True)]
        best = f"{readers} readers of {piece >> 20} MiB, the best of {len(WAYS)} ways"
        found = [self._rate("the disk itself, weights' files", "disk, weights", best)]
        if self.fio:
            found.append(self._rate("the same by fio", "fio", "io_uring, 32 requests of 1 MiB"))
        return [
            *found,
            self._rate("weights, disk → GPU", "weights", f"{self.run.shape.bytes / 1e9:.3g} GB, each chunk verified on the way"),
            self._beside("weights, disk → GPU ÷ the disk itself", self.rates["weights"], own, 0.95),
            Figure("weights: read from the disk ÷ their files", min(self.counted["weights"]), "", at_least=0.99),
            Figure("chunks of regions compared with the files", self.compared, "", at_least=1, detail="all of them, and none differs"),
            self._rate("the disk itself, an image's chunks", "disk, image", best),
            self._rate("image, disk → memory", "image", f"{size_of(self.image) / 1e9:.3g} GB, each chunk verified on the way"),
            self._beside("image, disk → memory ÷ the disk itself", self.rates["image"], self.rates["disk, image"]),
            Figure("image: read from the disk ÷ its chunks", min(self.counted["image"]), "", at_least=0.99),
        ]

    def _rate(self, name: str, of: str, how: str) -> Figure:
        rates = [rate / 1e9 for rate in self.rates[of]]
        detail = f"{how}; median of {len(rates)}, {min(rates):.2f} to {max(rates):.2f}"
        return Figure(name, statistics.median(rates), "GB/s", detail=detail)

    def _beside(self, name: str, ours: Sequence[float], own: Sequence[float], goal: float | None = None) -> Figure:
        """Each round's beside the disk's in that round: a noisy machine is noisy for both."""
        ratios = [one / other for one, other in zip(ours, own, strict=True)]
        detail = f"median of {len(ratios)} rounds, in turn, {min(ratios):.2f} to {max(ratios):.2f}"
        return Figure(name, statistics.median(ratios), "", at_least=goal, detail=detail)


def size_of(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def read_from_disk(pid: int) -> int:
    """Bytes that the kernel has read from disks for a process, and not from the page cache."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])


def room(needs: Needs) -> Room:
    return Room(-(-needs.whole // GIB) + 2, ARENA)


async def main() -> int:
    async with begun("disk", seconds=SECONDS, room=room) as run:
        bench = Bench(run)
        if await run.step("files", bench.prepare, 60) and await run.step("the disk's best", bench.probe, 30):
            for number in range(ROUNDS):
                if not await run.step(f"round {number + 1}", functools.partial(bench.round, number), bench.longest):
                    break
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
