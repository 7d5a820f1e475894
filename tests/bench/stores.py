"""Chunks fetched from a folder and from a bucket, each verified, beside what reads the same medium and does nothing else, in turn.

Beside the rates stands what processor time a gigabyte takes: that says the same on a machine that has other work.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import obstore
from blake3 import blake3
from obstore.store import S3Store

from restore_agent.snapshots.chunks import CHUNK, Chunk
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.layout import chunk_key
from restore_agent.transfer.source import Destination, Source
from restore_agent.transfer.streams import STREAMS
from tests.bench.figures import Figure
from tests.worlds.faulty_source import chunk_of
from tests.worlds.s3_server import KEY, SECRET, S3Server, s3_server

CHUNKS = 192  # of 4 MiB: 0.8 GB
ROUNDS = 7
_ROOM = 4 << 30  # bytes of the disk that have to be free


def unavailable() -> str:
    """Why nothing can be measured here; empty: it can."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return f"needs {_ROOM >> 30} GiB of disk, and {free >> 30} GiB are free" if free < _ROOM else ""


async def main() -> list[Figure]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        with s3_server(folder) as server:
            os.environ.update(server.environment())
            return [*await _folder(folder / "store"), *await _bucket(server)]


async def _folder(folder: Path) -> list[Figure]:
    folder.mkdir()
    store = Directory(folder)
    chunks = await _filled(store)
    flat = folder / "flat"
    flat.write_bytes(b"".join((folder / chunk_key(chunk.hash)).read_bytes() for chunk in chunks))
    os.sync()

    async def dd() -> None:
        command = ["dd", f"if={flat}", "of=/dev/null", "bs=4M", "iflag=direct"]
        await asyncio.to_thread(subprocess.run, command, check=True, stderr=subprocess.DEVNULL)

    async def fetch() -> None:
        await asyncio.to_thread(_forget, folder)
        await _fetched(store, chunks)

    figures = await _beside("a folder", "dd with O_DIRECT reads", dd, fetch, 0.9)
    await store.close()
    return figures


async def _bucket(server: S3Server) -> list[Figure]:
    store = Bucket(server.make_bucket("bench"))
    chunks = await _filled(store)
    alone = S3Store(
        "bench",
        config={"endpoint": server.endpoint, "access_key_id": KEY, "secret_access_key": SECRET, "region": "us-east-1"},
        client_options={"allow_http": True},
    )

    async def library(*, hashed: bool) -> None:
        todo = iter(chunks)

        async def stream() -> None:
            for chunk in todo:
                data = await (await obstore.get_async(alone, chunk_key(chunk.hash))).bytes_async()
                if hashed:
                    await asyncio.to_thread(blake3, data)

        await asyncio.gather(*(stream() for _ in range(STREAMS)))

    ours = functools.partial(_fetched, store, chunks)
    return [
        *await _beside("a bucket", "obstore alone gets", functools.partial(library, hashed=False), ours, 0.8),
        *await _beside("a bucket", "obstore gets and something hashes", functools.partial(library, hashed=True), ours),
    ]


async def _filled(store: Destination) -> list[Chunk]:
    chance = random.Random(11)
    chunks = []
    for _ in range(CHUNKS):
        data = chance.randbytes(CHUNK)
        chunks.append(chunk_of(data))
        await store.put(chunk_key(chunks[-1].hash), data)
    return chunks


async def _fetched(source: Source, chunks: Sequence[Chunk]) -> None:
    arrived: list[Chunk] = []
    await Fetch(lambda chunk: [source]).bring_all(chunks, lambda chunk, data: None, arrived.append)
    if len(arrived) != len(chunks):
        raise AssertionError("not every chunk has come")


async def _beside(
    where: str, what: str, medium: Callable[[], Awaitable[None]], ours: Callable[[], Awaitable[None]], goal: float | None = None
) -> list[Figure]:
    """Rates, the median of rounds in turn, and of each round's two the quotient; and processor time, of both ends where a server is one."""
    rates: dict[str, list[float]] = {"medium": [], "ours": []}
    costs: dict[str, list[float]] = {"medium": [], "ours": []}
    for turn in range(ROUNDS + 1):
        for name, work in (("medium", medium), ("ours", ours)):
            before, begin = processor_seconds(), time.perf_counter()
            await work()
            if turn:
                rates[name].append(CHUNKS * CHUNK / (time.perf_counter() - begin))
                costs[name].append((processor_seconds() - before) / (CHUNKS * CHUNK / 1e9))
    quotients = [one / other for one, other in zip(rates["ours"], rates["medium"], strict=True)]
    cost = {name: statistics.median(each) for name, each in costs.items()}
    spread = f"{ROUNDS} rounds in turn, {min(rates['ours']) / 1e6:.0f} to {max(rates['ours']) / 1e6:.0f}"
    return [
        Figure(f"from {where}: {what}", statistics.median(rates["medium"]) / 1e6, "MB/s"),
        Figure(f"from {where}: fetched and verified", statistics.median(rates["ours"]) / 1e6, "MB/s", detail=spread),
        Figure(f"from {where}: fetched, of what {what}", statistics.median(quotients), "", at_least=goal, detail="median of rounds"),
        Figure(f"from {where}: processor time, fetched and verified", cost["ours"], "s/GB", detail=f"{what}: {cost['medium']:.2f}"),
    ]


def processor_seconds() -> float:
    """Of this process, of its children that have ended, and of those that run."""
    used = sum(os.times()[:4])
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _forget(folder: Path) -> None:
    """Out of the page cache, so that the disk is read."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
