"""KEDA's push: from a model's first request to `true` in another process, with 1, 100 and 1,000 objects, and what idle objects cost.

The scaler runs in a process of its own; the client here holds both of KEDA's streams for every object, over TCP on one channel. The first
request's time is taken in the scaler's process just before the ledger learns of it, the push's here as it is read, both by CLOCK_MONOTONIC.
"""

import asyncio
import os
import random
from collections.abc import Coroutine
from pathlib import Path

from tests.bench.figures import Figure
from tests.worlds.keda_client import Keda, Watched, ref
from tests.worlds.scaler_process import models, scaler_process

OBJECTS = (1, 100, 1000)
REQUESTS = 1000
WARM_UP = 50
IDLE_SECONDS = 10.0
POLLS_PER_SECOND = 100.0  # of three calls each: 1,000 objects above zero, by the 30 s poll and by the HPA's 15 s sync


async def main() -> list[Figure]:
    figures = []
    for objects in OBJECTS:
        figures += await pushes(objects)
    return figures + await idle(max(OBJECTS))


async def pushes(objects: int) -> list[Figure]:
    """One first request after the other, each for a model chosen at random."""
    names = models(objects)
    async with scaler_process("127.0.0.1:0", objects) as scaler, Keda(scaler.address) as keda:
        watched = await watch(keda, names)
        seconds = []
        for _ in range(WARM_UP + REQUESTS):
            chosen = random.randrange(objects)
            asked = await scaler.do("hold", [names[chosen]])
            seconds.append(await watched[chosen].true() - asked)
            assert seconds[-1] > 0, "this push was for an earlier request"
            await scaler.do("leave", [names[chosen]])
        assert all(one.trues.empty() for one in watched), "there were more pushes than first requests"
        all_at_once = await scaler.do("all")
        last = max(await asyncio.gather(*(one.true() for one in watched))) - all_at_once
    ordered = sorted(seconds[WARM_UP:])
    middle, high = (1000 * ordered[round(share * len(ordered)) - 1] for share in (0.5, 0.99))
    detail = f"{REQUESTS} requests, one after the other; worst {1000 * ordered[-1]:.2f} ms"
    named = f"{objects:,} object{'s' if objects > 1 else ''}"
    found = [
        Figure(f"first request → push, p50, {named}", middle, "ms", detail=detail),
        Figure(f"first request → push, p99, {named}", high, "ms", at_most=10, detail=detail),
    ]
    if objects > 1:
        found.append(Figure(f"first requests of {named} in one instant → last push", 1000 * last, "ms"))
    return found


async def idle(objects: int) -> list[Figure]:
    """The scaler's memory and processor time under all streams, without calls and then with KEDA's polls."""
    async with scaler_process("127.0.0.1:0", objects) as scaler, Keda(scaler.address) as keda:
        pid = scaler.process.pid
        bare = memory(pid)
        watched = await watch(keda, models(objects))
        grown = memory(pid) - bare
        still = await busy(pid, asyncio.sleep(IDLE_SECONDS))
        polled = await busy(pid, polls(keda, watched))
    streams = f"{objects:,} objects, {2 * objects:,} streams"
    return [
        Figure(f"scaler's memory for {streams}", grown / 2**20, "MiB", detail=f"resident; {bare / 2**20:.0f} MiB without any"),
        Figure(f"scaler's processor time, {streams}, idle", 100 * still, "% of a core", detail=f"{IDLE_SECONDS:g} s"),
        Figure(
            "the same under KEDA's calls", 100 * polled, "% of a core", detail=f"{3 * POLLS_PER_SECOND:g} a second for {IDLE_SECONDS:g} s"
        ),
    ]


async def watch(keda: Keda, names: list[str]) -> list[Watched]:
    watched = [keda.watch(ref(name)) for name in names]
    async with asyncio.timeout(60):
        await asyncio.gather(*(one.specs.get() for one in watched))
    return watched


async def polls(keda: Keda, watched: list[Watched]) -> None:
    """What KEDA asks in IDLE_SECONDS, spread evenly."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(round(IDLE_SECONDS * POLLS_PER_SECOND)):
            await asyncio.sleep(begun + number / POLLS_PER_SECOND - loop.time())
            group.create_task(poll(keda, watched[number % len(watched)]))


async def poll(keda: Keda, watched: Watched) -> None:
    await keda.poll(watched.ref)


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu(pid: int) -> float:
    """Seconds of processor time of a process, all its threads together, to the nanosecond (the clock ticks of /proc/PID/stat are 10 ms)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


async def busy(pid: int, meanwhile: Coroutine[object, object, None]) -> float:
    """The share of one core that a process uses meanwhile."""
    loop = asyncio.get_running_loop()
    begun, before = loop.time(), cpu(pid)
    await meanwhile
    return (cpu(pid) - before) / (loop.time() - begun)
