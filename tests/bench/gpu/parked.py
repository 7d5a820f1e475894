"""vLLM parked, through the whole system: `python -m tests.bench.gpu.parked MODEL [--seconds S] [OPTION…]`.

As vllm.py: each figure from the gateway's first request, at zero replicas, to the first token of its streamed answer, and every answer that
of the engine before it was dumped. Here the engine is parked when the request comes: made so ahead, or kept so when it became idle; its
weights in the pool, or in host memory. Beside it, in the same run, a standby, one that is staged, and last a vLLM without zerowake. Then
what a parked engine costs: GPU memory, host memory, processor; and what parking takes. Writes
`tests/bench/results/parked-GPU-MODEL.json`.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import sys
import time
from pathlib import Path
from typing import ClassVar

import grpc
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from restore_agent.places.processes import cpu_seconds
from tests.bench.figures import Figure
from tests.bench.gpu.resume import SNAPSHOT, nothing, stage, until_rung
from tests.bench.gpu.run import begun
from tests.bench.gpu.vllm import Bench as VllmBench
from tests.bench.restore import at_zero, spread

SECONDS = 540.0
ROUNDS = 10
WATCHED_SECONDS = 10.0  # in which a parked engine's processor time is counted


class Bench(VllmBench):
    goals: ClassVar[dict[str, float]] = {
        "parked, made ahead": 0.035,
        "parked, kept when idle": 0.035,
        "parked, weights in host memory": 0.34,
        "standby, made ahead": 0.38,
        "staged": 0.60,
    }

    async def ahead(self) -> None:
        async with self.serving("memory"):
            await self.step("staged", lambda: self.case("staged", nothing), 20)
            await self.step("host memory", lambda: self.case("parked, weights in host memory", self.park_without_weights), 30)
            await self.step("parked", lambda: self.case("parked, made ahead", self.park, ROUNDS), 20)
            await self.step("standby", lambda: self.case("standby, made ahead", lambda: stage(self.state, pb.RUNG_STANDBY)), 20)
            await self.step("costs", self.costs, 20)

    async def kept(self) -> None:
        async with self.serving("parked"):
            await self.case("parked, kept when idle", lambda: until_rung(self.state, "parked"), ROUNDS)

    async def park(self) -> None:
        await stage(self.state, pb.RUNG_PARKED)

    async def park_without_weights(self) -> None:
        await self.park()
        await self.lose_weights(arena=True)

    async def costs(self) -> None:
        """Of a parked engine beside the same one as a standby, in turn."""
        await at_zero(self.state)
        await stage(self.state, pb.RUNG_STANDBY)
        ups, downs, held = [], [], []
        async with grpc.aio.insecure_channel(f"unix:{self.state / 'agent.sock'}") as channel:
            stub = agent_pb2_grpc.AgentStub(channel)
            for _ in range(5):
                before, began = self.run.gpus.used(), time.monotonic()
                await self.park()
                ups.append(time.monotonic() - began)
                held.append((self.run.gpus.used() - before) / 1e6)
                began = time.monotonic()
                await stub.Unstage(pb.UnstageRequest(request_id=secrets.token_hex(4), snapshot=SNAPSHOT, rung=pb.RUNG_STANDBY))
                downs.append(time.monotonic() - began)
        await self.park()
        processes = [pid for pid, _ in self.engines()]
        used = cpu_seconds(processes)
        await asyncio.sleep(WATCHED_SECONDS)
        share = (cpu_seconds(processes) - used) / WATCHED_SECONDS * 100
        memory = sum(private_bytes(pid) for pid in processes) / 1e6
        self.figures += [
            Figure("parked: GPU memory", statistics.median(held), "MB", detail=spread(held)),
            Figure("parked: host memory, private", memory, "MB", detail=f"{len(processes)} processes"),
            Figure("parked: processor", share, "%", detail=f"of one core, over {WATCHED_SECONDS:.0f} s, all its processes"),
            Figure("from standby to parked", statistics.median(ups), "s", detail=spread(ups)),
            Figure("from parked to standby", statistics.median(downs), "s", detail=spread(downs)),
        ]


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


async def main() -> int:
    async with begun("parked", seconds=SECONDS) as run:
        bench = Bench(run)
        if await run.step("snapshot", bench.create, 60):
            await run.step("made ahead", bench.ahead, 30)
            await run.step("kept when idle", bench.kept, 30)
        await run.step("plain vLLM", bench.plain, 75)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
