"""Several replicas of the scaler: from a model's first request at one to KEDA's push at another, and what a peer costs at 1,000 models.

Three processes: the replica that has the request, the one on which KEDA's streams are open, and this one, which is KEDA. What a peer
costs is taken from a subscriber's seat, here: the messages and bytes that come while requests begin and end as fast as the replica can.
"""

import asyncio
import os
import random
import time
from pathlib import Path

import grpc
from zerowake_proto import peers_pb2 as pb
from zerowake_proto import peers_pb2_grpc as pb_grpc

from tests.bench.figures import Figure
from tests.worlds.keda_client import Keda, ref
from tests.worlds.scaler_process import ScalerProcess, models, scaler_process

MODELS = 1000
REQUESTS = 1000
WARM_UP = 50
BUSY_SECONDS = 10.0


async def main() -> list[Figure]:
    return await pushes() + await costs()


async def pushes() -> list[Figure]:
    names = models(MODELS)
    async with (
        scaler_process("127.0.0.1:0", MODELS) as holding,
        scaler_process("127.0.0.1:0", MODELS, [holding.peer]) as asked,
        Keda(asked.address) as keda,
    ):
        watched = [keda.watch(ref(name)) for name in names]
        for one in watched:
            await one.specs.get()
        seconds = []
        for _ in range(WARM_UP + REQUESTS):
            chosen = random.randrange(MODELS)
            began = await holding.do("hold", [names[chosen]])
            seconds.append(await watched[chosen].true() - began)
            await holding.do("leave", [names[chosen]])
            while (await keda.stub.IsActive(watched[chosen].ref)).result:  # until the other replica knows that it is over
                await asyncio.sleep(0.001)
        began = await holding.do("all")
        last = max(await asyncio.gather(*(one.true() for one in watched))) - began
    ordered = sorted(seconds[WARM_UP:])
    middle, high = (1000 * ordered[round(share * len(ordered)) - 1] for share in (0.5, 0.99))
    detail = f"{MODELS:,} objects, {REQUESTS} requests one after the other; worst {1000 * ordered[-1]:.2f} ms"
    return [
        Figure("first request at one replica → push at another, p50", middle, "ms", detail=detail),
        Figure("first request at one replica → push at another, p99", high, "ms", at_most=20, detail=detail),
        Figure(f"first requests of {MODELS:,} models at one replica in one instant → last push at another", 1000 * last, "ms"),
    ]


async def costs() -> list[Figure]:
    names = models(MODELS)
    async with scaler_process("127.0.0.1:0", MODELS) as alone:
        before = memory(alone)
        async with scaler_process("127.0.0.1:0", MODELS, [alone.peer]) as other, grpc.aio.insecure_channel(alone.peer) as channel:
            await alone.do("all")
            stream = pb_grpc.PeersStub(channel).Watch(pb.WatchRequest(instance="benchmark"))
            first = await anext(aiter(stream))
            assert len(first.demands) == MODELS
            messages = size = changes = 0

            async def count() -> None:
                nonlocal messages, size
                async for update in stream:
                    messages += 1
                    size += update.ByteSize()

            counting = asyncio.create_task(count())
            used, began = processor(alone), time.monotonic()
            while time.monotonic() < began + BUSY_SECONDS:
                some = random.sample(names, 100)
                await alone.do("hold", some)
                await alone.do("leave", some)
                changes += 200
            took, used = time.monotonic() - began, processor(alone) - used
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)
            after = memory(alone)
            both = memory(other)
    return [
        Figure(
            f"messages to a peer while requests begin and end in {MODELS:,} models",
            messages / took,
            "/s",
            at_most=60,
            detail=f"{changes / took:,.0f} changes/s, {size / took / 1000:,.0f} kB/s, the replica's processor {100 * used / took:.0f} %",
        ),
        Figure(
            f"memory of a replica with two peers and {MODELS:,} models, above one without",
            (after - before) / 2**20,
            "MiB",
            detail=f"{before / 2**20:.0f} → {after / 2**20:.0f} MiB; a peer that knows all of it: {both / 2**20:.0f} MiB",
        ),
    ]


def memory(scaler: ScalerProcess) -> int:
    pages = int(Path(f"/proc/{scaler.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def processor(scaler: ScalerProcess) -> float:
    fields = Path(f"/proc/{scaler.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
