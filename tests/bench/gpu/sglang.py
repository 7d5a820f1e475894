"""SGLang from nothing to its first token, through the whole system: `python -m tests.bench.gpu.sglang MODEL [--seconds S] [OPTION…]`.

Like vllm.py: weights are published into gpumem, every page of the proving replica is compared with the image, and all answers of restored
replicas must be alike, token by token. An SGLang without zerowake is started last, what it compiles is there then; whether it answers the
same is said. The adapter is put beside SGLang as it is in a pod, by its folder alone. OPTIONs go to both SGLangs. Writes
`tests/bench/results/sglang-GPU-MODEL.json`. Needs root, CRIU, a GPU with its driver, SGLang (ZEROWAKE_SGLANG_SITE: its folder, where it is
not installed), blake3, and nvcc for the kernels that SGLang compiles; TVM_FFI_CACHE_DIR names a folder where they are already.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import sys
import time
from pathlib import Path
from typing import ClassVar

import aiohttp
from zerowake_proto import agent_pb2 as pb

from restore_agent.kubernetes.engine_packages import INSIDE, lay_out
from tests.bench.figures import Figure
from tests.bench.gpu.resume import nothing, stage
from tests.bench.gpu.run import LEFT, Run, begun, console, control
from tests.bench.gpu.vllm import PORT, QUESTION, Answer, background, give_up
from tests.bench.gpu.vllm import TOLD as VLLM_TOLD
from tests.bench.gpu.vllm import Bench as VllmBench
from tests.worlds.processes import below

SECONDS = 330.0  # none of its parts is begun after that
ROUNDS = 5
LAST = 75.0  # of them, which the plain SGLang may take
TOLD = re.compile(rf"{VLLM_TOLD.pattern}|Load weight end|KV Cache is allocated|CUDA graph end|Engine startup timings|graphs of attention")


class Bench(VllmBench):
    engine = "sglang"
    rounds: ClassVar[int] = ROUNDS
    goals: ClassVar[dict[str, float]] = {"standby, made ahead": 0.40, "staged": 0.65}
    telling = TOLD
    # It begins otherwise than the request that proves a replica: a prefix that one engine has cached and another has not is computed in
    # another shape, and the last bits of its numbers differ. So the first answer of each engine is the measure, and what it answers when
    # it has the question cached is compared with that of the others.
    question = QUESTION | {"prompt": "Seven, eight, nine,"}
    asked_before = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.again: Answer | None = None
        site = [os.environ["ZEROWAKE_SGLANG_SITE"]] if "ZEROWAKE_SGLANG_SITE" in os.environ else []
        beside = lay_out(run.folder)
        ours = str(beside.folder / Path(beside.path).relative_to(INSIDE))
        path = [ours, *site, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
        # Both compile kernels of theirs by nvcc as SGLang starts, some ten seconds each.
        kernels = {"TVM_FFI_CACHE_DIR": "tvm-ffi", "FLASHINFER_WORKSPACE_BASE": "flashinfer"}
        compiled = {variable: os.environ.get(variable, str(run.folder / "compiled" / folder)) for variable, folder in kernels.items()}
        self.env = {"PYTHONPATH": ":".join(path), "HF_HUB_OFFLINE": "1", **self.caches, **compiled}
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(run.model), "--served-model-name", "model"]
        self.command += ["--context-length", "8192", *run.options]

    async def ask_again(self, url: str) -> float:
        first, _, answer = await self.answered(url)
        if answer != (self.again or answer):
            raise AssertionError(f"asked again, it answers {answer}, and another one {self.again}")
        self.again = answer
        return first

    def engines(self) -> list[tuple[int, str]]:
        return [(pid, words) for _, pid, words in below(self.server) if "sglang" in words.lower() and "sandbox" not in words]

    async def from_zero(self) -> None:
        async with self.serving("memory"):
            await self.step("staged", lambda: self.case("staged", nothing), LAST + 20)
            await self.step("standby", lambda: self.case("standby, made ahead", lambda: stage(self.state, pb.RUNG_STANDBY)), LAST + 20)
            await self.step("parked", lambda: self.case("parked, made ahead", lambda: stage(self.state, pb.RUNG_PARKED)), LAST + 20)
            lost = "weights in host memory"
            await self.step("host memory", lambda: self.case(lost, lambda: self.lose_weights(arena=True)), LAST + 30)
            await self.step("anatomy", self.anatomy, LAST + 10)

    async def plain(self) -> None:
        """SGLang without zerowake, with the whole GPU: seconds until it is healthy and has given its whole answer."""
        await control(give_up)
        log, url = self.work / "plain.log", f"http://127.0.0.1:{PORT}"
        before = self.run.gpus.used()
        began = time.monotonic()
        async with background(log, *self.command, "--port", str(PORT), env=os.environ | self.env) as process:
            try:
                await healthy(f"{url}/health", process)
                ready = time.monotonic() - began
                _, last, answer = await self.answered(url)
            except BaseException:
                console.print(log.read_text(errors="replace")[-8000:], markup=False)
                raise
            self.cold = time.monotonic() - began
        async with asyncio.timeout(60):
            while self.run.gpus.used() > before + LEFT * 1e6:
                await asyncio.sleep(0.1)  # its scheduler ends after it
        self.told(log)
        detail = f"plain SGLang, weights in the page cache, one run; healthy {ready:.1f}, then the answer {last:.1f}"
        self.figures += [
            Figure("cold start to the whole answer, warm compile cache", self.cold, "s", detail=detail),
            Figure("plain SGLang's answer is the same", float(answer == self.answer), "", detail="as the restored ones'"),
        ]


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
        if await run.step("snapshot", bench.create, 60):
            await run.step("from memory", bench.from_zero, LAST + 30)
        await run.step("plain SGLang", bench.plain, 45)
        if bench.cold and "staged" in bench.medians:
            run.add(Figure("cold start ÷ staged", bench.cold / bench.medians["staged"], "×"))
        site = [os.environ["ZEROWAKE_SGLANG_SITE"]] if "ZEROWAKE_SGLANG_SITE" in os.environ else sys.path
        versions = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions(path=site)}
        run.told["sglang"] = versions.get("sglang")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
