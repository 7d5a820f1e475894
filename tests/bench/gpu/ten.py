"""Ten different models parked on one GPU, woken in turn: `python -m tests.bench.gpu.ten [MODEL,…] [--seconds S] [--work FOLDER] [OPTION…]`.

As parked.py, with vLLM and weights in the pool: each model is captured, then all wait parked beside each other, and requests go around. A
figure is from the gateway's first request for that model, at zero replicas of any, to the first token; each answer must be that of its own
engine before it was dumped, which no other model gives. Captures take most of the time, AT_ONCE of them beside each other; with `--work` a
second command goes on where the first one's seconds were over. A model's files are removed when it is captured, as all of them and all
that is kept of them have no room on a disk of 64 GiB. The last is a plain vLLM with the first model. Writes `results/ten-GPU-N.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import yaml

from restore_agent.snapshots.catalog import Catalog, Snapshot
from tests.bench.figures import Figure
from tests.bench.gpu.results import parts
from tests.bench.gpu.run import Run, begun, console
from tests.bench.gpu.vllm import Bench as VllmBench
from tests.bench.gpu.vllm import agent, background, compared
from tests.bench.restore import ZEROWAKE, spread, status
from tests.worlds.model_files import write_model
from tests.worlds.model_shapes import Shape

MODELS = (
    "granite-3.3-2b", "qwen3-0.6b", "qwen3-1.7b", "qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.2-1b", "smollm2-135m", "smollm2-360m",
    "smollm2-1.7b", "falcon-h1-0.5b",
)  # fmt: skip
SECONDS = 540.0
ROUNDS = 5
AT_ONCE = 4  # captures: each works on one core of its own for most of the time, and compiles on several
CAPTURE_SECONDS = 150.0  # that one may take
PARKED = "0.4"  # of the GPU, for all that are parked: 1.3 to 1.7 GiB each
GOAL = 0.05  # seconds, of the slowest model
CACHE = ("--kv-cache-memory-bytes", str(2 << 30))  # of one engine: as many as are awake have one
STATES = ("--max-num-seqs", "32")  # of an engine whose sequences each have a state in the cache, as vLLM wants no more than fit


class Model(VllmBench):
    """One of them."""

    def __init__(self, run: Run, shape: Shape) -> None:
        self.name, self.of = shape.name.replace(".", "-"), f", {shape.name}"
        self.question = self.question | {"model": self.name}
        states = STATES if "mamba_d_state" in shape.config else ()
        super().__init__(replace(run, shape=shape, model=run.model.parent / shape.name, options=[*CACHE, *states, *run.options]))
        self.taken: list[float] = []
        self.awake: list[float] = []  # the same request again
        self.phases: list[dict[str, float]] = []  # of each

    @property
    def is_captured(self) -> bool:
        return any(isinstance(each, Snapshot) and each.manifest.name == self.name for each in Catalog(self.state).list())

    async def captured(self) -> None:
        await asyncio.to_thread(write_model, self.run.model, self.run.shape)
        await self.capture()
        await asyncio.to_thread(shutil.rmtree, self.run.model)


class Ten:
    """All of them."""

    def __init__(self, run: Run) -> None:
        self.run, self.state, self.gateway = run, run.folder / "state", VllmBench.gateway
        self.models = [Model(run, shape) for shape in run.shapes]
        self.before = run.gpus.used()  # with the pool

    async def capture(self) -> None:
        """Those that are not captured yet, as far as the time goes."""
        missing = []
        for model in self.models:
            if model.is_captured:
                model.know_answer()
            else:
                missing.append(model)
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(model: Model) -> None:
            async with turns:
                await self.run.step(f"capture of {model.name}", model.captured, CAPTURE_SECONDS)

        if missing:
            async with agent(self.run.folder, self.state):
                await asyncio.gather(*(one(model) for model in missing))
            self.run.add(compared(self.run.folder / "agent.log"))
        if left := [model.name for model in self.models if not model.is_captured]:
            raise RuntimeError(f"not captured: {', '.join(left)}; the same command with --work goes on")

    async def in_turn(self) -> None:
        async with self.serving():
            began = time.monotonic()
            await self.until_parked()
            self.run.add(Figure("all of them parked", time.monotonic() - began, "s", detail="after the program's start, from memory"))
            self.hold()
            took = 0.0
            for turn in range(1, ROUNDS + 1):
                if time.monotonic() + took > self.run.until:
                    console.print(f"  round {turn} is not begun: one took {took:.0f} s")
                    break
                began = time.monotonic()
                for model in self.models:
                    await self.wake(model, turn)
                took = time.monotonic() - began
        self.run.add(*self.told())

    async def wake(self, model: Model, turn: int) -> None:
        """Until it is parked again. Raises AssertionError: it was not, or answered otherwise."""
        url = f"http://127.0.0.1:{self.gateway}"
        first, whole = await model.ask(url)
        model.awake.append(await model.ask_again(url))
        latest = next(each for each in (await status(self.state))["activations"] if each["model"] == model.name)
        model.phases.append(latest["phases"])
        where = parts(model.phases[-1:])
        said = f"awake {model.awake[-1]:.3f} s; {latest['origin']}; ms: {where}"
        console.print(f"  {turn} {model.name}: first {first:.3f} s, whole {whole:.3f}; {said}")
        if latest["origin"] != "parked":
            raise AssertionError(f"{model.name} was {latest['origin']} when its request came, and not parked: {latest['reason']}")
        model.taken.append(first)
        await self.until_parked()

    def hold(self) -> None:
        count = len(self.models)
        held = (self.run.gpus.used() - self.before) / 1e6
        self.run.add(Figure(f"{count} parked: GPU memory beside the pool", held, "MB", detail=f"{held / count:.0f} each"))

    def told(self) -> list[Figure]:
        medians = {model.run.shape.name: statistics.median(model.taken) for model in self.models}
        worst = max(medians, key=lambda name: medians[name])
        details = [
            f"{spread(model.taken)}; asked again, awake: {statistics.median(model.awake):.3f}; ms, medians: {parts(model.phases)}"
            for model in self.models
        ]
        single = [
            Figure(f"from zero, parked, {name}", median, "s", detail=detail)
            for (name, median), detail in zip(medians.items(), details, strict=True)
        ]
        return [*single, Figure(f"the slowest of {len(medians)}, median", medians[worst], "s", at_most=GOAL, detail=worst)]

    async def until_parked(self) -> None:
        async with asyncio.timeout(240):
            while True:
                now = await status(self.state)
                if not now["replicas"] and [each["rung"] for each in now["models"]] == ["parked"] * len(self.models):
                    return
                await asyncio.sleep(0.05)  # the status has no stream

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """`zerowake up` with all of them."""
        file, log = self.run.folder / "up.yaml", self.run.folder / "up.log"
        model = {"cooldown_seconds": 0.2, "polling_seconds": 0.2, "stage": "parked"}
        models = {each.name: {"snapshot": each.name, **model} for each in self.models}
        file.write_text(yaml.safe_dump({"state": str(self.state), "listen": f"127.0.0.1:{self.gateway}", "models": models}))
        async with background(log, *ZEROWAKE, "up", str(file), env=os.environ | {"ZEROWAKE_PARKED_BYTES": PARKED}):
            try:
                async with asyncio.timeout(60):
                    while not Path(self.state / "status.sock").exists():
                        await asyncio.sleep(0.1)  # until it listens
                yield
            except BaseException:
                console.print(log.read_text()[-8000:], markup=False)
                raise

    async def plain(self) -> None:
        first = self.models[0]
        await asyncio.to_thread(write_model, first.run.model, first.run.shape)
        await first.plain()


async def main() -> int:
    async with begun("ten", seconds=SECONDS, several=MODELS, at_once=AT_ONCE) as run:
        ten = Ten(run)
        if await run.step("captures", ten.capture, 0):
            await run.step("woken in turn", ten.in_turn, 75)
        await run.step("plain vLLM", ten.plain, 75)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
