"""SGLang from nothing to its first token, through the whole system: `python -m tests.bench.gpu.sglang MODEL [--seconds S] [OPTION…]`.

Like vllm.py: weights are published into gpumem, every page of the proving replica is compared with the image, and each answer, token by
token, with that of an SGLang without zerowake. The adapter is put beside SGLang as it is in a pod, by its folder alone. OPTIONs go to both
SGLangs. Writes `tests/bench/results/sglang-GPU-MODEL.json`. Needs root, CRIU, a GPU with its driver, SGLang (ZEROWAKE_SGLANG_SITE: its
folder, where it is not installed) and blake3.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import ClassVar

import aiohttp
from zerowake_proto import agent_pb2 as pb

from restore_agent.kubernetes.engine_packages import INSIDE, lay_out
from tests.bench.figures import Figure
from tests.bench.gpu.resume import nothing, stage
from tests.bench.gpu.run import LEFT, Run, begun, console
from tests.bench.gpu.vllm import PORT, QUESTION, background
from tests.bench.gpu.vllm import Bench as VllmBench
from tests.worlds.processes import below

SECONDS = 420.0  # none of its parts is begun after that
ROUNDS = 5


class Bench(VllmBench):
    engine = "sglang"
    compiled = "warm compile cache"
    rounds: ClassVar[int] = ROUNDS
    goals: ClassVar[dict[str, float]] = {"standby, made ahead": 0.40, "staged": 0.65}
    # It begins otherwise than the request that proves a replica: a prefix that the image has cached and the other SGLang has not is
    # computed in another shape, and the last bits of its numbers differ.
    question = QUESTION | {"prompt": "Seven, eight, nine,"}
    asked_before = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        site = [os.environ["ZEROWAKE_SGLANG_SITE"]] if "ZEROWAKE_SGLANG_SITE" in os.environ else []
        beside = lay_out(run.folder)
        ours = str(beside.folder / Path(beside.path).relative_to(INSIDE))
        path = [ours, *site, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
        kernels = {key: value for key, value in os.environ.items() if key == "TVM_FFI_CACHE_DIR"}
        self.env = {"PYTHONPATH": ":".join(path), "HF_HUB_OFFLINE": "1", **self.caches, **kernels}
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(run.model), "--served-model-name", "model"]
        self.command += ["--context-length", "8192", *run.options]

    def engines(self) -> list[tuple[int, str]]:
        return [(pid, words) for _, pid, words in below(self.server) if "sglang" in words.lower() and "sandbox" not in words]

    async def start(self, cache: str, detail: str) -> None:
        """SGLang without zerowake: seconds until it is healthy and has given its whole answer."""
        log = self.work / f"plain-{cache}.log"
        before = self.run.gpus.used()
        began = time.monotonic()
        async with background(
            log, *self.command, "--port", str(PORT), "--mem-fraction-static", "0.5", env=os.environ | self.env
        ) as process:
            try:
                async with asyncio.timeout(300):
                    await healthy(f"http://127.0.0.1:{PORT}/health", process)
                await self.ask(f"http://127.0.0.1:{PORT}")
            except BaseException:
                console.print(log.read_text()[-8000:], markup=False)
                raise
            self.cold = time.monotonic() - began
        async with asyncio.timeout(60):
            while self.run.gpus.used() > before + LEFT * 1e6:
                await asyncio.sleep(0.1)  # its scheduler ends after it
        self.figures.append(Figure(f"cold start to the whole answer, {cache} compile cache", self.cold, "s", detail=detail))

    async def from_zero(self) -> None:
        async with self.serving("memory"):
            await self.step("staged", lambda: self.case("staged", nothing), 20)
            await self.step("standby", lambda: self.case("standby, made ahead", lambda: stage(self.state, pb.RUNG_STANDBY)), 20)
            await self.step("parked", lambda: self.case("parked, made ahead", lambda: stage(self.state, pb.RUNG_PARKED)), 20)
            await self.step("host memory", lambda: self.case("weights in host memory", lambda: self.lose_weights(arena=True)), 30)
            await self.step("anatomy", self.anatomy, 10)


async def healthy(url: str, process: asyncio.subprocess.Process) -> None:
    """Raises RuntimeError: it has ended."""
    async with aiohttp.ClientSession() as session:
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"SGLang ended with {process.returncode} as it was to start")
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)  # until it listens


async def main() -> int:
    async with begun("sglang", seconds=SECONDS) as run:
        bench = Bench(run)
        if await run.step("plain SGLang", lambda: bench.start("empty", "plain SGLang, one run"), 60):
            if await run.step("snapshot", bench.create, 60):
                await run.step("from memory", bench.from_zero, 30)
            await run.step("plain again", lambda: bench.start("warm", "plain SGLang, weights in the page cache, one run"), 45)
        if bench.cold and "staged" in bench.medians:
            run.add(Figure("cold start ÷ staged", bench.cold / bench.medians["staged"], "×"))
        site = [os.environ["ZEROWAKE_SGLANG_SITE"]] if "ZEROWAKE_SGLANG_SITE" in os.environ else sys.path
        versions = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions(path=site)}
        run.told["sglang"] = versions.get("sglang")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
