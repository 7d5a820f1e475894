"""Restores: the chat model from zero to its first token through the whole system, the fill beside CRIU's own, embeddings in bursts.

Stock CRIU restores the very same dump, before it is split, in the same sandboxes, in turn with ours: once with the machine's own setting of
huge pages and once with them always on. Everything was touched before (page cache, free memory), except where `idle` is said: there the
system rests between two requests, as it does in use, and nothing is prepared for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from restore_agent.drivers.criu import Criu, Worker
from restore_agent.engine.canary import prove_canary, record_canary
from restore_agent.engine.engine import Engine
from restore_agent.pages.fill import Arena
from restore_agent.pages.images import split
from restore_agent.places.output import Pipes
from restore_agent.places.sandbox import Sandbox
from restore_agent.programs.main import enter_own_mounts
from restore_agent.snapshots.chunks import ChunkStore, Lease, write_chunks
from restore_agent.snapshots.manifest import CanaryRecord, EngineRecord
from restore_agent.snapshots.page_runs import write_index
from restore_agent.workload.control_directory import RESTORE_COMPLETE, SNAPSHOT_COMPLETE
from tests.bench.figures import Figure
from zerowake_shared.huge_pages import HugePages

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
ZEROWAKE = (sys.executable, "-m", "scaler.programs.cli")
PORT = 8000
ROUNDS = 7
REST_SECONDS = 6.0
QUESTION = {
    "model": "chat",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 16,
    "temperature": 0,
    "stream": True,
}
BIG = """
import http.server, os
memory = bytearray(os.urandom(64 << 20) * 32)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"%d" % sum(memory[:: 1 << 20]))
    def log_message(self, *words):
        pass
http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


async def main() -> list[Figure]:
    async with prepared() as bench:
        return [*await chat(bench.work), *await fill(bench), *await burst(bench)]


@contextlib.asynccontextmanager
async def prepared() -> AsyncIterator[Bench]:
    """A folder to work in, this process in mounts of its own, and a CRIU that knows this kernel. Raises PermissionError without root."""
    if os.geteuid() != 0:
        raise PermissionError("restores need root: run the benchmark with sudo")
    with tempfile.TemporaryDirectory(prefix="zerowake-bench-", dir="/var/tmp") as folder:
        work = Path(folder)
        enter_own_mounts(work)  # before anything starts a thread
        try:
            huge, kdat = HugePages.of_processes(work), work / "memory" / "criu.kdat"
            criu = Criu.find()
            async with await Sandbox.create(kdat) as sandbox:
                await criu.probe(sandbox, kdat)
            yield Bench(criu, kdat, huge, work)
        finally:
            await run("umount", str(work / "memory"))


# The chat model, through the whole system.


async def chat(work: Path) -> list[Figure]:
    state = work / "chat"
    packaged, expected = await first_start(work)
    colds = [await cold_start(DEMO / "chat.py") for _ in range(3)]
    cold = statistics.median(seconds for seconds, _ in colds)
    await run(
        *ZEROWAKE,
        "snapshot",
        "create",
        "chat",
        "--state",
        str(state),
        "--port",
        str(PORT),
        "--",
        sys.executable,
        str(DEMO / "chat.py"),
        "--port",
        str(PORT),
    )
    rested: list[float] = []
    at_once: list[float] = []
    async with system(state) as url:
        for seconds, into in ((REST_SECONDS, rested), (0.0, at_once)):
            for _ in range(ROUNDS):
                await at_zero(state)
                await asyncio.sleep(seconds)
                first, text = await ask(url)
                into.append(first)
                if text != expected or any(text != other for _, other in colds):
                    raise AssertionError(f"the restored replica answers {text!r}, the cold engine {expected!r}")
        phases = json.loads(await run(*ZEROWAKE, "status", "--json", "--state", str(state)))["activations"][0]["phases"]
    first = statistics.median(rested)
    parts = ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in phases.items())
    same = "same greedy tokens as the cold engine, every time"
    return [
        Figure("chat: first token from zero, after rest", first, "s", at_most=0.23, detail=f"{spread(rested)}; {same}"),
        Figure(
            "chat: first token from zero, again at once",
            statistics.median(at_once),
            "s",
            at_most=0.23,
            detail=f"{spread(at_once)}; ms: {parts}",
        ),
        Figure("chat: cold start of the packaged model (GGUF)", packaged, "s", detail="first start on a machine, one run"),
        Figure("chat: cold start of the prepared model", cold, "s", detail=spread([seconds for seconds, _ in colds])),
        Figure("chat: packaged cold start ÷ first token", packaged / first, "×", at_least=45),
        Figure("chat: prepared cold start ÷ first token", cold / first, "×", at_least=45),
    ]


async def first_start(work: Path) -> tuple[float, str]:
    """The engine as it starts where nobody has prepared its model yet: it reads the package's GGUF."""
    fresh = work / "fresh" / "deploy" / "demo"
    shutil.copytree(DEMO, fresh, ignore=shutil.ignore_patterns("__pycache__"))
    return await cold_start(fresh / "chat.py")


async def cold_start(program: Path) -> tuple[float, str]:
    """Seconds from the start of the process to its first token, and its answer."""
    began = time.monotonic()
    engine = await asyncio.create_subprocess_exec(sys.executable, str(program), "--port", "0", stdout=asyncio.subprocess.PIPE)
    try:
        assert engine.stdout is not None
        url = (await engine.stdout.readline()).decode().split()[-1]
        ready = time.monotonic() - began
        first, text = await ask(url)
        return ready + first, text
    finally:
        engine.terminate()
        await engine.wait()


async def ask(url: str) -> tuple[float, str]:
    """Seconds from the connected request to the first token of its answer, and all tokens."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/v1/models"):
            pass  # connected
        began, first, text = time.monotonic(), 0.0, ""
        async with session.post(f"{url}/v1/chat/completions", json=QUESTION) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                if token := json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    first = first or time.monotonic() - began
                    text += token
        return first, text


@contextlib.asynccontextmanager
async def system(state: Path) -> AsyncIterator[str]:
    port = 18080
    file = state.parent / "up.yaml"
    model = {"snapshot": "chat", "cooldown_seconds": 0.2, "polling_seconds": 0.2}
    file.write_text(yaml.safe_dump({"state": str(state), "listen": f"127.0.0.1:{port}", "models": {"chat": model}}))
    with (state.parent / "up.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*ZEROWAKE, "up", str(file), stdout=log, stderr=log)
    try:
        async with asyncio.timeout(30):
            while not (state / "status.sock").exists() or "memory" not in await rungs(state):
                await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def at_zero(state: Path) -> None:
    async with asyncio.timeout(30):
        while (await status(state))["replicas"]:
            await asyncio.sleep(0.05)


async def rungs(state: Path) -> list[str]:
    return [model["rung"] for model in (await status(state))["models"]]


async def status(state: Path) -> Any:
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(state / "status.sock"))) as session,
            session.get("http://zerowake/") as response,
        ):
            return await response.json()
    except aiohttp.ClientError:
        return {"models": [], "replicas": []}


# The same dump, restored by stock CRIU and by ours.


@dataclass
class Dumped:
    """One engine, dumped once: `stock` as CRIU wrote it, `ours` split, its pages in `arena`."""

    record: EngineRecord
    keys: tuple[str, str]
    stock: Path
    ours: Path
    arena: Arena
    canary: CanaryRecord


@dataclass
class Bench:
    criu: Criu
    kdat: Path
    huge: HugePages
    work: Path

    async def dump(self, name: str, record: EngineRecord, path: str, body: str) -> Dumped:
        stock, ours = self.work / name / "stock", self.work / name / "ours"
        stock.mkdir(parents=True)
        async with await Sandbox.create(self.kdat) as sandbox:
            output = Pipes(name)
            engine = await Engine.start(record, sandbox, output, for_snapshot=True)
            await engine.wait_healthy()
            canary = await record_canary(engine, path, body)
            await engine.wait_quiet()
            await self.criu.dump(sandbox, engine.pid, stock, 600, nothing)
            engine.tell(SNAPSHOT_COMPLETE)
            output.close()
        shutil.copytree(stock, ours)
        chunks, index = await asyncio.to_thread(write_chunks, Lease(ChunkStore(self.work / name / "chunks")), split(ours))
        write_index(ours / "pages.index", index)
        arena = await Arena.load(ChunkStore(self.work / name / "chunks"), chunks, (ours / "pages.index").read_bytes())
        return Dumped(record, output.keys, stock, ours, arena, canary)

    async def restore(
        self, dumped: Dumped, images: Path, fill: Callable[[Sandbox], Awaitable[None]], into: contextlib.AsyncExitStack
    ) -> Engine:
        sandbox = await into.enter_async_context(await Sandbox.create(self.kdat))
        output = Pipes("bench")
        into.callback(output.close)
        with output.writers() as fds:
            async with Worker.start(self.criu, sandbox, dict(zip(dumped.keys, fds, strict=True)), images) as worker:
                pid = await worker.restore(lambda: fill(sandbox))
        engine = Engine(dumped.record, sandbox, output, pid)
        engine.tell(RESTORE_COMPLETE)
        return engine

    async def stock(self, dumped: Dumped, into: contextlib.AsyncExitStack) -> Engine:
        return await self.restore(dumped, dumped.stock, nothing, into)

    async def stock_huge(self, dumped: Dumped, into: contextlib.AsyncExitStack) -> Engine:
        with self.huge.on():
            return await self.stock(dumped, into)

    async def ours(self, dumped: Dumped, into: contextlib.AsyncExitStack) -> Engine:
        async def fill(sandbox: Sandbox) -> None:
            with self.huge.on():
                self.filled = await dumped.arena.fill(sandbox.host_pids())

        return await self.restore(dumped, dumped.ours, fill, into)


async def nothing(*_: object) -> None:
    pass


async def fill(bench: Bench) -> list[Figure]:
    program = bench.work / "big.py"
    program.write_text(BIG)
    record = EngineRecord(command=(sys.executable, str(program)), env={"PATH": os.environ["PATH"]}, port=PORT, health_path="/")
    dumped = await bench.dump("big", record, "/", "")
    seconds: dict[str, list[float]] = {"stock": [], "stock_huge": [], "ours": []}
    rates = []
    for _ in range(ROUNDS + 1):
        for way, into in seconds.items():
            async with contextlib.AsyncExitStack() as stack:
                began = time.monotonic()
                engine = await getattr(bench, way)(dumped, stack)
                into.append(time.monotonic() - began)
                await prove_canary(engine, dumped.canary)
            if way == "ours":
                rates.append(dumped.arena.size / bench.filled)
    ours, stock, huge = (statistics.median(each[1:]) for each in (seconds["ours"], seconds["stock"], seconds["stock_huge"]))
    # CRIU's own rate, without what it takes with hardly any pages to fill.
    skeleton = ours - dumped.arena.size / statistics.median(rates[1:])
    rate, theirs = statistics.median(rates[1:]) / 1e9, dumped.arena.size / (stock - skeleton) / 1e9
    theirs_huge = dumped.arena.size / (huge - skeleton) / 1e9
    shutil.rmtree(bench.work / "big")
    return [
        Figure(
            "2 GiB process: pages filled",
            rate,
            "GB/s",
            detail=f"{os.cpu_count()} threads; restore {ours:.2f} s, {spread(seconds['ours'][1:])}",
        ),
        Figure("stock CRIU, same dump", theirs, "GB/s", detail=f"restore {stock:.2f} s, {spread(seconds['stock'][1:])}"),
        Figure("stock CRIU, huge pages always", theirs_huge, "GB/s", detail=f"restore {huge:.2f} s, {spread(seconds['stock_huge'][1:])}"),
        Figure("pages filled ÷ stock CRIU", rate / theirs, "×", at_least=1.8),
        Figure("pages filled ÷ stock CRIU with huge pages", rate / theirs_huge, "×", at_least=1.8),
    ]


async def burst(bench: Bench) -> list[Figure]:
    command = (sys.executable, str(DEMO / "embeddings.py"), "--port", str(PORT))
    record = EngineRecord(command=command, env={"PATH": os.environ["PATH"]}, directory=str(DEMO), port=PORT)
    body = json.dumps({"model": "all-minilm-l6-v2", "input": "From nothing to an answer."})
    dumped = await bench.dump("embeddings", record, "/v1/embeddings", body)
    figures = []
    for count in (1, 2, 4, 8):
        seconds: dict[str, list[float]] = {"stock_huge": [], "ours": []}
        for _ in range(ROUNDS + 1):
            for way, into in seconds.items():
                into.append(await at_once(bench, dumped, getattr(bench, way), count))
        ours, stock = (statistics.median(each[1:]) for each in (seconds["ours"], seconds["stock_huge"]))
        detail = f"{spread(seconds['ours'][1:])}; stock CRIU with huge pages, same dump: {stock:.3f}; the replica's own work is in both"
        figures.append(
            Figure(
                f"{count} embedding replicas at once, last first answer", ours, "s", at_most=round(0.8 * PUBLISHED[count], 3), detail=detail
            )
        )
        figures.append(Figure(f"{count} embedding replicas ÷ stock CRIU", ours / stock, "×", detail="stock CRIU runs in our sandboxes too"))
    return figures


PUBLISHED = {1: 0.12, 2: 0.16, 4: 0.32, 8: 0.64}
"""Stock CRIU with huge pages on the two-core development machine, seconds: measured before there was any of this code."""


async def at_once(bench: Bench, dumped: Dumped, way: Callable[[Dumped, contextlib.AsyncExitStack], Awaitable[Engine]], count: int) -> float:
    """Seconds until the last of so many replicas has given its first, proved answer."""

    async def one(stack: contextlib.AsyncExitStack) -> None:
        await prove_canary(await way(dumped, stack), dumped.canary)

    async with contextlib.AsyncExitStack() as stack:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one(stack))
        return time.monotonic() - began


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{err.decode()[-4000:]}")
    return out.decode()


def spread(seconds: list[float]) -> str:
    return f"median of {len(seconds)}, {min(seconds):.3f} to {max(seconds):.3f} s"
