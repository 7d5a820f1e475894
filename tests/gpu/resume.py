"""From nothing to an answer on a GPU, through the whole system: `python -m tests.gpu.resume [qwen3-8b|small]`.

gpumem holds the weights, `thaw up` holds the snapshot; each figure is from the gateway's first request to its answer, from zero. Prints one
table and writes `tests/bench/results/resume-GPU.json`. Needs root, CRIU, a GPU with its driver, torch.
"""

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from rich.console import Console
from thaw_proto import gpumem_pb2

from gpumem.control import Control
from gpumem.errors import PeerGone
from restore_agent.cuda import Cuda
from tests.bench.__main__ import RESULTS, specs
from tests.bench.figures import Figure, table
from tests.bench.restore import THAW, at_zero, run, rungs, spread, status
from tests.gpu.serve import SIZES
from tests.gpu.weights import write_checkpoint

ROOT = Path(__file__).parents[2]
PORT, GATEWAY = 8000, 18081
ROUNDS = 6
GOALS = {"staged": 0.40, "weights in host memory": 0.55}
console = Console(width=200)


async def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "qwen3-8b"
    cuda = Cuda.find()
    if cuda is None:
        raise SystemExit("needs an NVIDIA GPU")
    gpu = cuda.gpus()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="thaw-gpu-", dir=os.environ.get("THAW_GPU_WORK", "/var/tmp")) as folder:
        work = Path(folder)
        await asyncio.to_thread(write_checkpoint, work / "weights", SIZES[name])
        size = SIZES[name].bytes
        os.environ["GPUMEM_SOCKET"] = str(work / "gpumem.sock")
        before = cuda.used()
        async with pool(work, size):
            figures += await measure(name, work, cuda)
        figures.append(Figure("GPU memory left over", (cuda.used() - before) / 1e6, "MB", at_most=64, detail="after everything has ended"))
    console.print(table(figures))
    path = RESULTS / f"resume-{gpu.names[0].split()[-1].lower()}-{name}.json"
    path.write_text(
        json.dumps(
            {
                "command": f"python -m tests.gpu.resume {name}",
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": specs() | {"gpus": gpu.names, "driver": gpu.driver},
                "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
            },
            indent=2,
            ensure_ascii=False,
        )
        + "\n"
    )
    console.print(f"kept in {path}")
    return 0


async def measure(name: str, work: Path, cuda: Cuda) -> list[Figure]:
    state = work / "state"
    server = [sys.executable, "-m", "tests.gpu.serve", str(PORT), name]
    cold_seconds, cold = await cold_start(server, work)
    console.print(f"cold start to the first answer {cold_seconds:.2f} s")
    said = await run(*THAW, "snapshot", "create", "model", "--state", str(state), "--port", str(PORT), "--canary", "/answer",
                     "--weights", str(work / "weights"), "--directory", str(ROOT), "--", *server)  # fmt: skip
    console.print(said.strip())
    figures = [Figure("cold start, weights in the pool", cold_seconds, "s", detail="import torch, context, graph; one run")]
    async with system(state):
        cases: dict[str, list[float]] = {"staged": [], "weights in host memory": []}
        phases: dict[str, Any] = {}
        for case, into in cases.items():
            for _ in range(ROUNDS):
                await at_zero(state)
                if case != "staged":
                    await evict()
                    await control(lambda c: fill_arena(c, work))
                seconds, answer = await ask()
                into.append(seconds)
                if answer != cold:
                    raise AssertionError(f"the restored server answers {answer}, the cold one {cold}")
                phases[case] = (await status(state))["activations"][0]["phases"]
        for case, seconds in cases.items():
            parts = ", ".join(f"{phase} {took * 1000:.0f}" for phase, took in phases[case].items())
            figures.append(
                Figure(f"from zero, {case}", statistics.median(seconds), "s", at_most=GOALS[case], detail=f"{spread(seconds)}; ms: {parts}")
            )
        await at_zero(state)
        figures.append(Figure("GPU memory of nobody's replica", cuda.used() / 1e9, "GB", detail="the pool, at zero replicas"))
    figures.append(Figure("cold start ÷ staged", cold_seconds / statistics.median(cases["staged"]), "×"))
    return figures


async def cold_start(server: list[str], work: Path) -> tuple[float, Any]:
    region = (await control(lambda c: fill_device(c, work))).id.hex()
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(*server, env=os.environ | {"GPUMEM_REGION": region}, cwd=ROOT)
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(300):
            while True:
                try:
                    async with session.get(f"http://127.0.0.1:{PORT}/answer") as response:
                        return time.monotonic() - began, await response.json()
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.02)  # until it listens
    finally:
        process.terminate()
        await process.wait()


async def ask() -> tuple[float, Any]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{GATEWAY}/v1/models"):
            pass  # connected
        began = time.monotonic()
        async with session.get(f"http://127.0.0.1:{GATEWAY}/models/model/answer") as response:
            answer = await response.json()
            if response.status != 200:
                raise AssertionError(answer)
            return time.monotonic() - began, answer


@contextlib.asynccontextmanager
async def system(state: Path) -> AsyncIterator[None]:
    file = state.parent / "up.yaml"
    model = {"snapshot": "model", "cooldown_seconds": 0.2, "polling_seconds": 0.2}
    file.write_text(yaml.safe_dump({"state": str(state), "listen": f"127.0.0.1:{GATEWAY}", "models": {"model": model}}))
    with (state.parent / "up.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*THAW, "up", str(file), stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60):
            while not (state / "status.sock").exists() or "memory" not in await rungs(state):
                await asyncio.sleep(0.1)  # until the image is staged
        yield
    except BaseException:
        console.print((state.parent / "up.log").read_text()[-6000:], markup=False)
        raise
    finally:
        process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def pool(work: Path, size: int) -> AsyncIterator[None]:
    """gpumem with room for the weights, on the GPU and in its arena."""
    reserve = f"{(size >> 30) + 2}G"
    command = ["-c", "from gpumem.commands import app; app()", "serve", "--reserve", reserve, "--arena", f"{(size >> 30) + 3}G"]
    process = await asyncio.create_subprocess_exec(sys.executable, *command)
    try:
        async with asyncio.timeout(120):
            while not await answers():
                await asyncio.sleep(0.1)  # until it listens
        yield
    finally:
        process.terminate()
        await process.wait()


async def answers() -> bool:
    try:
        await control(lambda c: c.status())
    except PeerGone:
        return False
    return True


async def control(call: Any) -> Any:
    async with Control.connected(Path(os.environ["GPUMEM_SOCKET"])) as connected:
        return await call(connected)


async def fill_device(connected: Control, work: Path) -> gpumem_pb2.Filled:
    layout, sources = await asyncio.to_thread(checkpoint, work)
    return await connected.fill(layout, sources, connected.welcome.devices[0].identity)


async def fill_arena(connected: Control, work: Path) -> gpumem_pb2.Filled:
    layout, sources = await asyncio.to_thread(checkpoint, work)
    return await connected.fill(layout, sources, "")


async def evict() -> None:
    """The region off the GPU; its chunks stay in the arena where they are there."""

    async def call(connected: Control) -> None:
        async with asyncio.timeout(10):
            while any(region.leases for region in (await connected.status()).regions):
                await asyncio.sleep(0.005)  # the last replica's processes are ending
        for region in (await connected.status()).regions:
            await connected.evict(gpumem_pb2.RegionRef(device=region.device, id=region.id))

    await control(call)


_read: dict[Path, Any] = {}


def checkpoint(work: Path) -> Any:
    """Layout and sources, hashed once."""
    from gpumem.safetensors import read_checkpoint  # noqa: PLC0415

    if work not in _read:
        found = read_checkpoint(work / "weights")
        _read[work] = (found.layout.SerializeToString(deterministic=True), found.parts)
    return _read[work]


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
