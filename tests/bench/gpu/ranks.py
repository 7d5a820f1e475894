"""vLLM over several GPUs, through the whole system: `python -m tests.bench.gpu.ranks MODEL [--tensor-parallel-size N] [--seconds S]`.

N is 2 unless said; other options go to vLLM. As parked.py, whose cases these are, with one engine of N ranks; beside that the rate of its
tokens, restored and as vLLM has it: one request at a time, its first token not counted. Last vLLM is started as it is anywhere, and, where
time is left, with NCCL over the host's shared memory alone, which is what ranks fall back to. Writes
`tests/bench/results/ranks-GPU-MODEL.json`. Needs what vllm.py needs, and N GPUs. What GPUs do with the kernel alone is seen before, in
seconds, by `pytest -s tests/gpu/test_peer_ranks.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import aiohttp
from zerowake_proto import agent_pb2 as pb

from restore_agent.workload.vllm.collectives import ENVIRONMENT
from tests.bench.figures import Figure
from tests.bench.gpu.parked import Bench as ParkedBench
from tests.bench.gpu.resume import nothing, stage
from tests.bench.gpu.run import Run, begun, control
from tests.bench.gpu.vllm import PORT, background, give_up
from tests.bench.restore import spread

SECONDS = 540.0
ROUNDS = 5
TOKENS = 257  # of each request whose rate is measured
OPTION = "--tensor-parallel-size"
OURS = "ranks talk over each other's memory"  # the adapter's own words


class Bench(ParkedBench):
    goals: ClassVar[dict[str, float]] = {
        "parked, made ahead": 0.05,
        "parked, weights in host memory": 0.34,
        "standby, made ahead": 0.9,
        "staged": 1.3,
    }

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.rates: dict[str, float] = {}  # ms a token

    async def create(self) -> None:
        await super().create()
        log = (self.work / "agent.log").read_text(errors="replace")
        self.figures.append(
            Figure(OURS, float(OURS in log), "", at_least=1, detail="else by NCCL over the host's memory; agent.log says why")
        )

    async def restored(self) -> None:
        """Staged, standby, parked; and the rate of an engine that was restored."""
        async with self.serving("memory"):
            await self.step("staged", lambda: self.case("staged", nothing, ROUNDS), 20)
            await self.step("rate, restored", lambda: self.rate("restored", f"http://127.0.0.1:{self.gateway}"), 20)
            await self.step("standby", lambda: self.case("standby, made ahead", lambda: stage(self.state, pb.RUNG_STANDBY), ROUNDS), 20)
            await self.step("parked", lambda: self.case("parked, made ahead", self.park, ROUNDS), 20)
            await self.step("host memory", lambda: self.case("parked, weights in host memory", self.park_without_weights, ROUNDS), 30)

    async def rate(self, name: str, url: str) -> None:
        """Milliseconds a token of one request, once it is warm."""
        taken = []
        for number in range(ROUNDS + 1):
            async with asyncio.timeout(60):
                each = await self.paced(url)
            if number:
                taken.append(each * 1000)
        self.rates[name] = statistics.median(taken)
        self.figures.append(Figure(f"a token, {name}", self.rates[name], "ms", detail=f"{spread(taken)}; {TOKENS - 1} tokens each"))

    async def paced(self, url: str) -> float:
        """Seconds from one token to the next, of a whole answer."""
        times: list[float] = []
        question = self.question | {"max_tokens": TOKENS, "ignore_eos": True}
        async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=question) as response:
            async for line in response.content:
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
                    times.append(time.monotonic())
            if response.status != 200 or len(times) < TOKENS // 2:
                raise RuntimeError(f"{response.status}, {len(times)} tokens: {await response.text()}")
        return (times[-1] - times[0]) / (TOKENS - 1)

    async def as_it_is(self) -> None:
        """vLLM without zerowake: its start, its rate."""
        await self.started("plain", [], {})

    async def by_nccl(self) -> None:
        """The same with NCCL over the host's shared memory alone."""
        await self.started("NCCL over the host's memory", ["--disable-custom-all-reduce"], ENVIRONMENT)

    async def started(self, name: str, options: Sequence[str], env: Mapping[str, str]) -> None:
        """With the whole GPUs, which gpumem gives up. So this comes last."""
        await control(give_up)
        log, url, began = self.work / f"{name.split(maxsplit=1)[0]}.log", f"http://127.0.0.1:{PORT}", time.monotonic()
        command = [*self.command, *options, "--port", str(PORT)]
        async with background(log, *command, env={**os.environ, **self.env, **env}) as process:
            answer = await self.first_answer(process, log, url)
            cold = time.monotonic() - began
            detail = f"warm compile cache, weights in the page cache, one run; the answer is the same: {answer == self.answer}"
            self.figures.append(Figure(f"cold start to the whole answer, {name}", cold, "s", detail=detail))
            await self.rate(name, url)


async def main() -> int:
    words = sys.argv[1:]
    if not any(word.partition("=")[0] == OPTION for word in words):
        words += [OPTION, "2"]
    async with begun("ranks", seconds=SECONDS, words=words) as run:
        bench = Bench(run)
        if await run.step("snapshot", bench.create, 60):
            await run.step("restored", bench.restored, 60)
        await run.step("vLLM as it is", bench.as_it_is, 75)
        if {"restored", "plain"} <= bench.rates.keys():
            share = bench.rates["plain"] / bench.rates["restored"]
            run.add(Figure("token rate of a restored engine ÷ vLLM as it is", share, "", at_least=0.98))
        await run.step("NCCL alone", bench.by_nccl, 75)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
