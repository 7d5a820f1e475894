"""vLLM from nothing to its first byte, through the whole system: `python -m tests.bench.gpu.vllm MODEL [--seconds S] [OPTION…]`.

MODEL is a shape (run.py); OPTIONs go to every vLLM. `zerowake snapshot create --engine vllm` starts, publishes the weights into gpumem and
dumps, and its proof compares every page with the image; each figure is from the gateway's first request, at zero replicas, to the first
token of its streamed answer. Every answer must be that of the engine before it was dumped. A vLLM without zerowake is started last, its
compile cache warm then; whether it answers the same is said, and no more than said: from one start of its own to the next vLLM answers in
one of two ways. A case that fails is named, and the next one is tried. Prints what the image is made of, the phases and the engine's own
words; writes `tests/bench/results/vllm-GPU-MODEL.json`. Needs root, CRIU, a GPU with its driver, and vLLM (ZEROWAKE_VLLM_SITE: its folder,
where it is not installed).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import gpumem_pb2

from gpumem.checkpoint.safetensors import kept_reading
from gpumem.client.control import Control
from restore_agent.snapshots.catalog import Catalog
from tests.bench.figures import Figure
from tests.bench.gpu.results import parts
from tests.bench.gpu.resume import nothing, stage, system, until_rung
from tests.bench.gpu.run import Run, begun, console, control
from tests.bench.pages import uncache
from tests.bench.restore import ZEROWAKE, at_zero, spread, status
from tests.worlds.processes import below

PORT, GATEWAY = 8000, 18081
SECONDS = 540.0
ROUNDS = 6
QUESTION = {"model": "model", "prompt": "One, two, three,", "max_tokens": 16, "temperature": 0, "seed": 1, "logprobs": 1, "stream": True}
GOALS = {"standby, made ahead": 0.38, "standby, kept when idle": 0.38, "staged": 0.60}
TOLD = re.compile(
    r"asleep|awake|attached|lent by gpumem|warm-up|own memory|to wake up|fall asleep|Traceback|Error|Graph capturing|init engine"
)
COLOUR = re.compile("\x1b\\[[0-9;]*m")
Answer = tuple[str, list[float]]  # text, log-probabilities
COMPARED = (sys.executable, "-m", "tests.worlds.compared")


class Bench:
    engine = "vllm"
    program: ClassVar[tuple[str, ...]] = ("-m", "vllm.entrypoints.cli.main")
    gateway = GATEWAY  # its port
    rounds: ClassVar[int] = ROUNDS
    compiled = "empty compile cache"
    goals: ClassVar[dict[str, float]] = GOALS
    name = "model"  # the snapshot's, and the model's for whoever asks
    of = ""  # which of several models, in the names of figures
    question = QUESTION
    telling = TOLD  # which lines of its log are shown
    asked_before = True  # the dump: else the first answer is what all others are compared with

    def __init__(self, run: Run) -> None:
        self.run, self.step, self.figures = run, run.step, run.figures
        self.work, self.state = run.folder, run.folder / "state"
        self.answer: Answer | None = None  # all must be alike
        self.cold = 0.0
        self.server = 0  # pid of `zerowake up`
        self.medians: dict[str, float] = {}
        # A cache is shared with the replicas only where it is there, or named; else what is compiled is in the image, and compiled again.
        folders = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
        self.caches = {variable: str(run.folder / "compiled" / folder) for variable, folder in folders.items()}
        site = [os.environ["ZEROWAKE_VLLM_SITE"]] if "ZEROWAKE_VLLM_SITE" in os.environ else []
        self.env = {
            "PYTHONPATH": ":".join([*site, *filter(None, os.environ.get("PYTHONPATH", "").split(":")), str(Path(__file__).parents[3])]),
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "HF_HUB_OFFLINE": "1",
            **self.caches,
        }
        self.command = [sys.executable, *self.program, "serve", str(run.model)]
        self.command += ["--served-model-name", self.name, "--max-model-len", "8192", *run.options]

    async def create(self) -> None:
        log = self.work / "agent.log"
        async with agent(self.work, self.state):
            try:
                await self.capture()
            except RuntimeError:
                console.print(log.read_text()[-12000:], markup=False)
                raise
            finally:
                self.told(log)
        self.figures.append(compared(log))
        self.anatomy_of_image()

    async def capture(self) -> None:
        """By the agent that runs. Raises RuntimeError: the command ended otherwise than well."""
        env = [word for key, value in self.env.items() for word in ("--env", f"{key}={value}")]
        canary = {key: value for key, value in self.question.items() if key != "stream"}
        asked = ["--canary", f"/v1/completions={json.dumps(canary)}"] if self.asked_before else []
        words = ["--engine", self.engine, "--port", str(PORT), "--state", str(self.state), *asked, *env, "--", *self.command]
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(*ZEROWAKE, "snapshot", "create", self.name, *words)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        if code:
            raise RuntimeError(f"zerowake snapshot create {self.name} ended with {code}")
        took = time.monotonic() - began
        self.figures.append(Figure(f"zerowake snapshot create --engine {self.engine}{self.of}", took, "s", detail=self.compiled))
        self.know_answer()

    def know_answer(self) -> None:
        """That of the engine before the dump."""
        if self.asked_before and (before := Catalog(self.state).get("default", self.name).manifest.canary):
            choice = json.loads(before.answer)["choices"][0]
            self.answer = choice["text"], [round(each, 2) for each in choice["logprobs"]["token_logprobs"]]
            console.print(f"  the answer before the dump{self.of}: {self.answer}", markup=False)

    def anatomy_of_image(self) -> None:
        manifest = Catalog(self.state).get("default", self.name).manifest
        gpu = sum(manifest.gpus.values())
        skeleton = f"{len(manifest.chunks)} chunks; CRIU restores {manifest.criu_bytes / 1e6:.1f} MB"
        lent = sum(record.size for record in manifest.weights)
        self.figures += [
            Figure("image: pages", manifest.page_bytes / 1e6, "MB", detail=skeleton),
            Figure("image: GPU memory that the suspend set free", gpu / 1e6, "MB", detail="weights and KV cache are lent, and not in it"),
            Figure("weights, lent", lent / 1e6, "MB", detail=f"{len(manifest.weights)} regions"),
        ]
        for process in manifest.processes:
            console.print(f"  pid {process.pid}{' (GPU)' if process.gpu else ''}: {process.command[:120]}", markup=False)

    async def anatomy(self) -> None:
        """Of the engine's processes, as they stand still in a standby."""
        await at_zero(self.state)
        await stage(self.state, pb.RUNG_STANDBY)
        for pid, command in self.engines():
            describe(Path(f"/proc/{pid}"), command)

    def engines(self) -> list[tuple[int, str]]:
        """Pids and commands of the engine's processes below `zerowake up`."""
        return [(pid, words) for _, pid, words in below(self.server) if "vllm" in words.lower() and "sandbox" not in words]

    async def case(self, case: str, prepare: Callable[[], Awaitable[None]], rounds: int | None = None) -> None:
        taken, whole, awake, phases = [], [], [], []
        url = f"http://127.0.0.1:{self.gateway}"
        for i in range(rounds or self.rounds):
            await at_zero(self.state)
            await prepare()
            first, last = await self.ask(url)
            taken.append(first)
            whole.append(last)
            awake.append(await self.ask_again(url))  # what of it is the engine's own
            latest = (await status(self.state))["activations"][0]
            phases.append(latest["phases"])
            said = f"awake {awake[-1]:.3f} s; {latest['outcome']} {latest['reason']}; ms: {parts(phases[-1:])}"
            console.print(f"  {case} {i + 1}: first {first:.3f} s, whole {last:.3f} s; {said}")
        self.medians[case] = statistics.median(taken)
        detail = f"{spread(taken)}; the whole answer {statistics.median(whole):.3f}; asked again, awake: {statistics.median(awake):.3f}"
        detail += f"; ms, medians: {parts(phases)}"
        self.figures.append(Figure(f"from zero, {case}", self.medians[case], "s", at_most=self.goals.get(case), detail=detail))

    async def ask(self, url: str) -> tuple[float, float]:
        """Seconds to the first token and to the last. The answer must be the one before."""
        first, last, answer = await self.answered(url)
        if self.answer is None:
            self.answer = answer
            console.print(f"  the answer: {answer}", markup=False)
        elif answer != self.answer:
            raise AssertionError(f"the answer is {answer}, and was {self.answer}")
        return first, last

    async def ask_again(self, url: str) -> float:
        """Seconds to the first token of an engine that has answered this question since it woke."""
        return (await self.ask(url))[0]

    async def first_answer(self, process: asyncio.subprocess.Process, log: Path, url: str) -> Answer:
        """Of an engine that is starting. Raises RuntimeError: it has ended, and what it said is printed."""
        while True:
            try:
                return (await self.answered(url))[2]
            except aiohttp.ClientConnectionError:
                if process.returncode is not None:
                    console.print(log.read_text()[-6000:], markup=False)
                    raise RuntimeError(f"vLLM ended with {process.returncode}") from None
                await asyncio.sleep(0.1)  # until it listens

    async def answered(self, url: str) -> tuple[float, float, Answer]:
        tokens: list[Any] = []
        first = 0.0
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/v1/models"):
                pass  # connected
            began = time.monotonic()
            async with session.post(f"{url}/v1/completions", json=self.question) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        first = first or time.monotonic() - began
                        choice = json.loads(line[6:])["choices"][0]
                        logprobs = choice["logprobs"] or {"token_logprobs": []}
                        tokens.append((choice["text"], [round(each, 2) for each in logprobs["token_logprobs"]]))
                if response.status != 200 or not tokens:
                    raise RuntimeError(f"{response.status}: {await response.text()}")
        last = time.monotonic() - began
        return first, last, ("".join(token for token, _ in tokens), [number for _, numbers in tokens for number in numbers])

    async def staged(self) -> None:
        async with self.serving("memory"):
            await self.step("staged", lambda: self.case("staged", nothing), 20)
            await self.step("standby, made ahead", lambda: self.case("standby, made ahead", lambda: stage(self.state, pb.RUNG_STANDBY)), 20)
            await self.step(
                "weights in host memory", lambda: self.case("weights in host memory", lambda: self.lose_weights(arena=True)), 30
            )
            await self.step("anatomy", self.anatomy, 10)

    async def kept(self) -> None:
        async with self.serving("standby"):
            await self.case("standby, kept when idle", lambda: until_rung(self.state, "standby"))

    async def from_disk(self) -> None:
        async def prepare() -> None:
            await stage(self.state, pb.RUNG_DISK)
            await self.lose_weights(arena=True)
            catalog = Catalog(self.state)
            chunks = [catalog.chunks.path(chunk.hash) for chunk in catalog.get("default", self.name).chunks]
            await asyncio.to_thread(uncache, chunks)

        async with self.serving("disk"):
            await self.case("weights in host memory, image on disk", prepare)

    @contextlib.asynccontextmanager
    async def serving(self, rung: str) -> AsyncIterator[None]:
        try:
            async with system(self.state, rung, self.gateway) as self.server:
                yield
        finally:
            self.told(self.work / "up.log")

    async def lose_weights(self, *, arena: bool) -> None:
        """The regions off the GPU, and what they had there in the pool again; with `arena` their chunks are in the arena afterwards."""

        async def call(connected: Control) -> None:
            async with asyncio.timeout(10):
                while any(region.leases for region in (await connected.status()).regions):
                    await asyncio.sleep(0.005)  # the last replica's processes are ending
            for region in (await connected.status()).regions:
                if region.device:
                    await connected.evict(gpumem_pb2.RegionRef(device=region.device, id=region.id))
            for directory in (self.state / "weights").iterdir() if arena else ():
                if found := kept_reading(directory):
                    await connected.fill(found.layout, found.parts, "")
            async with asyncio.timeout(10):
                while any(device.owed_bytes for device in (await connected.status()).devices):
                    await asyncio.sleep(0.005)

        await control(call)

    async def plain(self) -> None:
        """vLLM without zerowake, as it is started anywhere: with the whole GPU, which gpumem gives up. So this comes last."""
        await control(give_up)
        log = self.work / "plain.log"
        began = time.monotonic()
        async with background(log, *self.command, "--port", str(PORT), env=os.environ | self.env) as process:
            answer = await self.first_answer(process, log, f"http://127.0.0.1:{PORT}")
            self.cold = time.monotonic() - began
        detail = "plain vLLM, weights in the page cache, one run"
        self.figures += [
            Figure(f"cold start to the whole answer, warm compile cache{self.of}", self.cold, "s", detail=detail),
            Figure("plain vLLM's answer is the same", float(answer == self.answer), "", detail="it has two, from start to start"),
        ]

    def told(self, log: Path) -> None:
        """What the engine said of itself."""
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            message = COLOUR.sub("", line.rpartition('"message":"')[2].removesuffix('"}'))
            if self.telling.search(message):
                console.print(f"  | {message[:230]}", markup=False, highlight=False)


def describe(folder: Path, command: str) -> None:
    """A process's memory by what it is: MiB resident, and that of the largest mappings."""
    kinds: Counter[str] = Counter()
    largest: list[tuple[int, str]] = []
    mappings, name, where = 0, "", ""
    for line in (folder / "smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.split(" ")[0]:
            words = line.split(maxsplit=5)
            name, where, mappings = words[5] if len(words) > 5 else "anonymous", words[0], mappings + 1
        elif key == "Rss":
            size = int(rest.split()[0])
            kind = name if name.startswith("[") or name == "anonymous" else name.split("/")[1] + " files" if "/" in name else name
            kinds[kind] += size
            largest.append((size, f"{where} {name}"))
    state = {line.partition(":")[0]: line.split()[1] for line in (folder / "status").read_text().splitlines() if len(line.split()) > 1}
    shares = ", ".join(f"{kind} {size >> 10}" for kind, size in kinds.most_common(8))
    console.print(f"  {command[:60]}: {mappings} mappings, {state.get('Threads')} threads; MiB: {shares}", markup=False)
    for size, what in sorted(largest, reverse=True)[:6]:
        console.print(f"    {size >> 10} MiB {what}", markup=False)


@contextlib.asynccontextmanager
async def agent(work: Path, state: Path) -> AsyncIterator[None]:
    """One that compares every page of what it restores; its words are in agent.log."""
    command = (*COMPARED, "agent", "--state", str(state), "--gpumem", os.environ["GPUMEM_SOCKET"])
    async with background(work / "agent.log", *command):
        async with asyncio.timeout(30):
            while not (state / "agent.sock").exists():
                await asyncio.sleep(0.1)  # until it listens
        yield


async def give_up(gpumem: Control) -> None:
    """All memory that it lends to nobody."""
    for device in (await gpumem.status()).devices:
        await gpumem.reserve(device.identity, 0)


def compared(log: Path) -> Figure:
    """Of the processes that were restored as proofs."""
    found = re.findall(r"^compared (\d+) filled, (\d+) kept, (\d+) zeros", log.read_text(), re.MULTILINE)
    pages = sum(int(number) for numbers in found for number in numbers)
    return Figure("pages of the restored processes compared", pages, "", at_least=1, detail="with the image; none differs")


@contextlib.asynccontextmanager
async def background(log: Path, *command: str, env: dict[str, str] | None = None) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that runs meanwhile, and all its children."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file, env=env)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def main() -> int:
    async with begun("vllm", seconds=SECONDS) as run:
        bench = Bench(run)
        if await run.step("snapshot", bench.create, 60):
            await run.step("from memory", bench.staged, 30)
            await run.step("kept as a standby", bench.kept, 30)
            await run.step("from disk", bench.from_disk, 30)
        await run.step("plain vLLM", bench.plain, 75)
        if bench.cold and "staged" in bench.medians:
            run.add(Figure("cold start ÷ staged", bench.cold / bench.medians["staged"], "×", at_least=80))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
