"""SGLang from nothing to its first token, through the whole system: `python -m tests.bench.gpu.sglang MODEL [--seconds S] [OPTION…]`.

Like vllm.py: every page of the proving replica compared with the image, and each answer, token by token,
that of an SGLang without zerowake. No adapter takes part: the engine is taken when it is idle, weights and KV cache travel in the
image. OPTIONs go to both SGLangs. Writes `tests/bench/results/sglang-GPU-MODEL.json`. Needs root, CRIU, a GPU with its driver, SGLang
(ZEROWAKE_SGLANG_SITE: its folder, where it is not installed).
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

from restore_agent.snapshots.store import Catalog
from tests.bench.figures import Figure
from tests.bench.gpu.resume import nothing, stage
from tests.bench.gpu.run import LEFT, Run, begun, console
from tests.bench.gpu.sizes import Room
from tests.bench.gpu.vllm import PORT, QUESTION, background
from tests.bench.gpu.vllm import Bench as VllmBench

SECONDS = 420.0  # none of its parts is begun after that
ROUNDS = 5
RESERVE, ARENA = 1, 1  # GiB: nothing is lent, but an agent asks gpumem for room


class Bench(VllmBench):
    engine = "sglang"
    compiled = "warm compile cache"
    goals: ClassVar[dict[str, float]] = {}
    # It begins otherwise than the request that proves a replica: a prefix that the image has cached and the other SGLang has not is
    # computed in another shape, and the last bits of its numbers differ.
    question = QUESTION | {"prompt": "Seven, eight, nine,"}
    asked_before = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        site = [os.environ["ZEROWAKE_SGLANG_SITE"]] if "ZEROWAKE_SGLANG_SITE" in os.environ else []
        path = [*site, *filter(None, os.environ.get("PYTHONPATH", "").split(":")), str(Path(__file__).parents[3])]
        kernels = {key: value for key, value in os.environ.items() if key == "TVM_FFI_CACHE_DIR"}
        self.env = {"PYTHONPATH": ":".join(path), "HF_HUB_OFFLINE": "1", **kernels}
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(run.model), "--served-model-name", "model"]
        self.command += ["--context-length", "8192", *run.options]

    def anatomy_of_image(self) -> None:
        manifest = Catalog(self.state).get("default", "model").manifest
        skeleton = f"{len(manifest.chunks)} chunks; CRIU restores {manifest.skeleton_bytes / 1e6:.1f} MB"
        gpu = sum(manifest.gpus.values()) / 1e6
        self.figures += [
            Figure("image: pages", manifest.page_bytes / 1e6, "MB", detail=skeleton),
            Figure("image: GPU memory that the suspend set free", gpu, "MB", detail="weights, KV cache and graphs travel in it"),
        ]
        for process in manifest.processes:
            console.print(f"  pid {process.pid}{' (GPU)' if process.gpu else ''}: {process.command[:120]}", markup=False)

    async def start(self, cache: str, detail: str) -> None:
        """SGLang without zerowake: seconds until it is healthy and has given its whole answer."""
        log = self.work / f"plain-{cache}.log"
        before = self.run.gpus.used()
        began = time.monotonic()
        async with background(log, *self.command, "--port", str(PORT), "--mem-fraction-static", "0.5", env=os.environ | self.env):
            try:
                async with asyncio.timeout(300):
                    await healthy(f"http://127.0.0.1:{PORT}/health")
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
            await self.step("staged", lambda: self.case("staged", nothing, ROUNDS), 20)
            standby = lambda: stage(self.state, pb.RUNG_STANDBY)  # noqa: E731
            await self.step("standby", lambda: self.case("standby, made ahead", standby, ROUNDS), 20)


async def healthy(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)  # until it listens


async def main() -> int:
    async with begun("sglang", seconds=SECONDS, room=lambda _: Room(RESERVE, ARENA)) as run:
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
