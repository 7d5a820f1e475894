"""llama.cpp's two servers as `--engine llama-cpp` snapshots them: from zero to the first token, beside cold starts of the same command, in
turn; then three replicas at once, and what they hold of memory together. A cold start finds the model in the page cache, as a restore does.
"""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog
from tests.bench.figures import Figure
from tests.bench.restore import PORT, QUESTION, ZEROWAKE, ask, at_zero, prepared, run, spread, system
from tests.worlds.agent import post, running
from tests.worlds.health import is_well
from tests.worlds.llama_cpp import mappings, model, server

ROUNDS = 5
REPLICAS = 3
COLD_PORT = 18081
CONTEXT = "2048"


def unavailable() -> str:
    return "" if server() else "it needs llama-server, which `make servers` installs"


async def main() -> list[Figure]:
    found = server()
    if found is None:
        raise FileNotFoundError(unavailable())
    servers = {"llama-server": ([found, "--model", str(model()), "--ctx-size", CONTEXT], "/health")}
    if importlib.util.find_spec("llama_cpp"):
        python = [sys.executable, "-m", "llama_cpp.server", "--model", str(model()), "--n_ctx", CONTEXT]
        servers["llama-cpp-python"] = (python, "/openapi.json")
    figures = []
    async with prepared() as bench:
        for name, (command, health) in servers.items():
            (bench.work / name).mkdir()
            figures += await measured(bench.work / name, name, command, health)
    return figures


async def measured(work: Path, name: str, command: Sequence[str], health: str) -> list[Figure]:
    state = work / "state"
    options = ["--state", str(state), "--port", str(PORT), "--engine", "llama-cpp"]
    began = time.monotonic()
    await run(*ZEROWAKE, "snapshot", "create", "chat", *options, "--", *command)
    created = time.monotonic() - began
    manifest = Catalog(state).get("default", "chat").manifest
    cold: list[float] = []
    restored: list[float] = []
    texts = set()
    async with system(state) as url:
        for _ in range(ROUNDS + 1):  # the first is left out of both
            for into, took, text in ((cold, *await from_cold(command, health)), (restored, *await from_zero(state, url))):
                into.append(took)
                texts.add(text)
    if len(texts) != 1:
        raise AssertionError(f"cold and restored engines answer otherwise: {texts}")
    at_once, total, of_model = await three_at_once(state)
    size = model().stat().st_size / 1e6
    first = statistics.median(restored[1:])
    same = "the same 16 greedy tokens every time"
    return [
        Figure(f"{name}: first token from zero, restored", first, "s", detail=f"{spread(restored[1:])}; {same}"),
        Figure(f"{name}: first token, started cold", statistics.median(cold[1:]), "s", detail=f"{spread(cold[1:])}; in turn"),
        Figure(f"{name}: cold ÷ restored", statistics.median(cold[1:]) / first, "×"),
        Figure(f"{name}: image", manifest.image_bytes / 1e6, "MB", detail=f"the GGUF has {size:.0f} MB and is not in it"),
        Figure(f"{name}: of which CRIU restores", manifest.criu_bytes / 1e6, "MB"),
        Figure(f"{name}: {REPLICAS} at once, last first token", statistics.median(at_once[1:]), "s", detail=spread(at_once[1:])),
        Figure(f"{name}: memory of {REPLICAS}", total / 1e6, "MB", detail="proportional set size, each has answered"),
        Figure(f"{name}: of which the GGUF", of_model / 1e6, "MB", detail=f"{size:.0f} MB in the file"),
        Figure(f"{name}: snapshot created and proved", created, "s", detail="one run"),
    ]


async def from_cold(command: Sequence[str], health: str) -> tuple[float, str]:
    """Seconds from the start of the process to its first token, and its answer."""
    port = str(COLD_PORT)
    quiet = asyncio.subprocess.DEVNULL
    began = time.monotonic()
    engine = await asyncio.create_subprocess_exec(*command, "--port", port, stdout=quiet, stderr=quiet)
    try:
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session, asyncio.timeout(120):
            while not await is_well(session, url + health):
                await asyncio.sleep(0.02)
        ready = time.monotonic() - began
        first, text = await ask(url)
        return ready + first, text
    finally:
        engine.terminate()
        await engine.wait()


async def from_zero(state: Path, url: str) -> tuple[float, str]:
    await at_zero(state)
    return await ask(url)


async def three_at_once(state: Path) -> tuple[list[float], int, int]:
    """Seconds until each of so many replicas has said a token; then the bytes that they hold together, and those of the model's file."""
    seconds, total, of_model = [], 0, 0
    token = {**QUESTION, "max_tokens": 1, "stream": False}
    loop = asyncio.get_running_loop()
    async with running(state) as agent:
        await agent.stage("chat")
        with ThreadPoolExecutor(REPLICAS) as pool:

            async def one() -> pb.Replica:
                replica = (await agent.restore("chat")).replica
                if replica.origin != pb.ORIGIN_RESTORED:
                    raise AssertionError(f"it was not restored: {replica.detail}")
                await loop.run_in_executor(pool, post, replica, "/v1/chat/completions", token)
                return replica

            for _ in range(ROUNDS + 1):
                began = time.monotonic()
                replicas = await asyncio.gather(*(one() for _ in range(REPLICAS)))
                seconds.append(time.monotonic() - began)
                found = list(mappings(model()))
                of_model = sum(mapping["Pss"] for mapping in found)
                total = sum(pss(pid) for pid in {mapping["pid"] for mapping in found})
                await asyncio.gather(*(agent.release(replica) for replica in replicas))
    return seconds, total, of_model


def pss(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
