"""From nothing to an answer on a GPU, through the whole system: `python -m tests.bench.gpu.resume [qwen3-8b|small]`.

gpumem holds the weights, `zerowake up` holds the snapshot; each figure is from the gateway's first request to its answer, at zero replicas,
and every answer is compared with the cold server's. Beside it, in the same run, plain CRIU and CUDA checkpoint with the weights in the
image. Prints one table and writes `tests/bench/results/resume-GPU-SIZE.json`. Needs root, CRIU, a GPU with its driver, torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import yaml
from rich.console import Console
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc, gpumem_pb2

from gpumem.client.control import Control
from restore_agent.drivers.criu import Criu
from restore_agent.drivers.cuda import Cuda
from restore_agent.snapshots.catalog import Catalog
from tests.bench.figures import Figure, table
from tests.bench.gpu.plain import plain
from tests.bench.gpu.results import keep
from tests.bench.gpu.run import control, pool
from tests.bench.pages import disk_seconds, touched, uncache
from tests.bench.restore import ZEROWAKE, at_zero, rungs, spread, status
from tests.worlds.checkpoints import SIZES, write_checkpoint

ROOT = Path(__file__).parents[3]
PORT, GATEWAY = 8000, 18081
ROUNDS, IN_A_ROW = 6, 10
GOALS = {"standby, made ahead": 0.30, "standby, kept when idle": 0.30, "staged": 0.40, "weights in host memory": 0.55}
SNAPSHOT = pb.SnapshotRef(namespace="default", name="model")
console = Console(width=220)


async def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "qwen3-8b"
    cuda = Cuda.find()
    if cuda is None:
        raise SystemExit("needs an NVIDIA GPU")
    gpu = cuda.gpus()
    with tempfile.TemporaryDirectory(prefix="zerowake-gpu-", dir=os.environ.get("ZEROWAKE_GPU_WORK", "/var/tmp")) as folder:
        work = Path(folder)
        await asyncio.to_thread(write_checkpoint, work / "weights", SIZES[name])
        os.environ["GPUMEM_SOCKET"] = str(work / "gpumem.sock")
        before = cuda.used()
        size = SIZES[name].bytes >> 30
        async with pool(size + 2, size + 3):
            bench, figures = await measure(name, work, cuda)
        async with pool(size + 2, 1), system(bench.state, "disk"):  # too small an arena to keep them
            figures += await from_disk(bench, work)
        figures.append(Figure("GPU memory left over", (cuda.used() - before) / 1e6, "MB", at_most=64, detail="after everything has ended"))
        show(name, gpu, figures)
        figures += await baseline(name, work, cuda)
    ours = {figure.name: figure.value for figure in figures}
    plainly = ours["plain CRIU + CUDA checkpoint, weights in the image"]
    figures.append(Figure("plain CRIU + CUDA ÷ staged", plainly / ours["from zero, staged"], "×", at_least=20))
    show(name, gpu, figures)
    return 0


def show(name: str, gpu: Any, figures: list[Figure]) -> None:
    console.print(table(figures))
    machine = {"gpus": gpu.names, "driver": gpu.driver}
    path = keep(f"resume-GPU-{name}", f"python -m tests.bench.gpu.resume {name}", machine, figures)
    console.print(f"kept in {path}")


async def measure(name: str, work: Path, cuda: Cuda) -> tuple[Bench, list[Figure]]:
    state = work / "state"
    server = [sys.executable, "-m", "tests.worlds.torch_engine", str(PORT), name]
    cold_seconds, cold = await cold_start(server, work)
    console.print(f"cold start to the first answer {cold_seconds:.2f} s")
    compared, said = await compared_run("snapshot", "create", "model", "--state", str(state), "--port", str(PORT), "--canary", "/answer",
                     "--weights", str(work / "weights"), "--directory", str(ROOT), "--", *server)  # fmt: skip
    console.print(said.strip())
    figures = [
        Figure("cold start, weights in the pool", cold_seconds, "s", detail="import torch, context, graph; one run"),
        Figure("pages of a restored process compared with the image", compared, "", at_least=1, detail="all of them, and none differs"),
    ]
    bench = Bench(state, cold)
    async with system(state, "memory"):
        figures.append(await bench.case("staged", nothing))
        figures.append(await bench.case("standby, made ahead", lambda: stage(state, pb.RUNG_STANDBY)))
        figures.append(await bench.case("weights in host memory", lambda: lose_weights(work, arena=True)))
        figures += await leaks(bench, cuda)
        figures.append(Figure("GPU memory of nobody's replica", cuda.used() / 1e9, "GB", detail="the pool, at zero replicas"))
    async with system(state, "standby"):
        figures.append(await bench.case("standby, kept when idle", lambda: until_rung(state, "standby")))
    figures.append(Figure("cold start ÷ staged", cold_seconds / bench.medians["staged"], "×"))
    return bench, figures


async def compared_run(*arguments: str) -> tuple[int, str]:
    """A command of `zerowake` that compares every page of each replica that it restores. Returns how many, and what it printed."""
    command = [sys.executable, "-m", "tests.worlds.compared", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{err.decode()[-4000:]}")
    lines = [line for line in err.decode().splitlines() if line.startswith("compared ")]
    return sum(int(number) for line in lines for number in re.findall(r"\d+", line)), out.decode() + "\n".join(lines)


class Bench:
    def __init__(self, state: Path, cold: Any) -> None:
        self.state = state
        self.cold = cold
        self.medians: dict[str, float] = {}

    async def case(self, case: str, prepare: Callable[[], Awaitable[None]]) -> Figure:
        taken = []
        for _ in range(ROUNDS):
            await at_zero(self.state)
            await prepare()
            taken.append(await self.ask())
        phases = (await status(self.state))["activations"][0]["phases"]
        parts = ", ".join(f"{phase} {took * 1000:.0f}" for phase, took in phases.items())
        self.medians[case] = statistics.median(taken)
        figure = Figure(f"from zero, {case}", self.medians[case], "s", at_most=GOALS.get(case), detail=f"{spread(taken)}; ms: {parts}")
        console.print(f"{figure.name}: {figure.value:.3f} s, {figure.detail}")
        return figure

    async def ask(self) -> float:
        """Seconds from the connected request to the whole answer, which must be the cold server's."""
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{GATEWAY}/v1/models"):
                pass  # connected
            began = time.monotonic()
            async with session.get(f"http://127.0.0.1:{GATEWAY}/models/model/answer") as response:
                answer = await response.json()
                seconds = time.monotonic() - began
        if answer != self.cold:
            raise AssertionError(f"the restored server answers {answer}, the cold one {self.cold}")
        return seconds


async def leaks(bench: Bench, cuda: Cuda) -> list[Figure]:
    """Many restores one after the other: what is there afterwards that was not there before."""

    async def held() -> tuple[int, int, int, int]:
        await at_zero(bench.state)
        await asyncio.sleep(4)  # the memory kept for the next restore is taken again, and processes have ended
        processes = [each for each in Path("/proc").iterdir() if each.name.isdigit()]
        namespaces = set()
        for process in processes:
            for kind in ("pid", "net", "mnt", "ipc"):
                with contextlib.suppress(OSError):
                    namespaces.add((process / "ns" / kind).readlink())
        memory = {line.split(":")[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if "kB" in line}
        return cuda.used(), memory["MemTotal"] - memory["MemAvailable"], len(namespaces), len(list(Path("/dev/shm").iterdir()))

    before = await held()
    for _ in range(IN_A_ROW):
        await at_zero(bench.state)
        await bench.ask()
    after = await held()
    names = ("GPU memory", "host memory", "namespaces", "files in /dev/shm")
    units = ("MB", "MB", "", "")
    bounds = (64, 256, 0, 0)
    return [
        Figure(f"left by {IN_A_ROW} restores in a row: {name}", (new - old) / (1e6 if unit else 1), unit or "more", at_most=bound)
        for name, unit, bound, old, new in zip(names, units, bounds, before, after, strict=True)
    ]


async def from_disk(bench: Bench, work: Path) -> list[Figure]:
    """Image and weights from the same disk, beside that disk's own time for all these bytes, in turn."""
    snapshot = Catalog(bench.state).get("default", "model")
    images = [Catalog(bench.state).chunks.path(chunk.hash) for chunk in snapshot.chunks]
    files = sorted({*images, *(work / "weights").glob("*.safetensors")})
    size = sum(path.stat().st_size for path in files)
    memory = await asyncio.to_thread(touched, size)
    raw, ours = [], []
    for _ in range(3):
        await at_zero(bench.state)
        await stage(bench.state, pb.RUNG_DISK)
        await lose_weights(work, arena=False)  # the arena has no room to keep more than a sixteenth
        await asyncio.to_thread(uncache, files)
        raw.append(await asyncio.to_thread(disk_seconds, files, memory))
        await asyncio.to_thread(uncache, files)
        ours.append(await bench.ask())
        console.print(f"from disk {ours[-1]:.2f} s, the disk's own {raw[-1]:.2f} s")
    own, taken = statistics.median(raw), statistics.median(ours)
    return [
        Figure("the disk's own time for image and weights", own, "s", detail=f"{size / own / 1e9:.2f} GB/s; {spread(raw)}"),
        Figure("from zero, image and weights on disk", taken, "s", detail=spread(ours)),
        Figure("from disk ÷ the disk's own time", taken / own, "×", at_most=1.2),
    ]


async def baseline(name: str, work: Path, cuda: Cuda) -> list[Figure]:
    folder = work / "baseline"
    folder.mkdir()
    kdat = folder / "criu.kdat"
    server = [sys.executable, "-m", "tests.worlds.torch_engine", str(PORT), name]
    return await plain(Criu.find(), cuda, kdat, folder, server, PORT, ROOT)


async def nothing() -> None:
    pass


async def stage(state: Path, rung: pb.Rung) -> None:
    """To that rung, up or down."""
    async with grpc.aio.insecure_channel(f"unix:{state / 'agent.sock'}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        asked = secrets.token_hex(4)
        if rung == pb.RUNG_DISK:
            await stub.Unstage(pb.UnstageRequest(request_id=asked, snapshot=SNAPSHOT, rung=rung))
        else:
            await stub.Stage(pb.StageRequest(request_id=asked, snapshot=SNAPSHOT, rung=rung))


async def until_rung(state: Path, rung: str) -> None:
    async with asyncio.timeout(60):
        while rung not in await rungs(state):
            await asyncio.sleep(0.05)  # the status has no stream


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


@contextlib.asynccontextmanager
async def system(state: Path, waits_on: str, port: int = GATEWAY) -> AsyncIterator[int]:
    """`zerowake up`; yields its pid. `waits_on`: the rung of the model's `stage`. `port`: the gateway's."""
    file = state.parent / "up.yaml"
    model = {"snapshot": "model", "cooldown_seconds": 0.2, "polling_seconds": 0.2, "stage": waits_on}
    file.write_text(yaml.safe_dump({"state": str(state), "listen": f"127.0.0.1:{port}", "models": {"model": model}}))
    with (state.parent / "up.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*ZEROWAKE, "up", str(file), stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60):
            while not (state / "status.sock").exists() or waits_on not in await rungs(state):
                if process.returncode is not None:
                    raise RuntimeError(f"zerowake up ended with {process.returncode}")
                await asyncio.sleep(0.1)  # until the image is staged
        yield process.pid
    except BaseException:
        console.print((state.parent / "up.log").read_text()[-6000:], markup=False)
        raise
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def fill_device(connected: Control, work: Path) -> gpumem_pb2.Filled:
    layout, sources = await asyncio.to_thread(checkpoint, work)
    return await connected.fill(layout, sources, connected.welcome.devices[0].identity)


async def lose_weights(work: Path, *, arena: bool) -> None:
    """The region off the GPU; with `arena` its chunks are in the arena afterwards."""

    async def call(connected: Control) -> None:
        layout, sources = await asyncio.to_thread(checkpoint, work)
        async with asyncio.timeout(10):
            while any(region.leases for region in (await connected.status()).regions):
                await asyncio.sleep(0.005)  # the last replica's processes are ending
        for region in (await connected.status()).regions:
            await connected.evict(gpumem_pb2.RegionRef(device=region.device, id=region.id))
        if arena:
            await connected.fill(layout, sources, "")

    await control(call)


_read: dict[Path, Any] = {}


def checkpoint(work: Path) -> Any:
    """Layout and sources, hashed once."""
    from gpumem.checkpoint.safetensors import read_checkpoint  # noqa: PLC0415

    if work not in _read:
        found = read_checkpoint(work / "weights")
        _read[work] = (found.layout.SerializeToString(deterministic=True), found.parts)
    return _read[work]


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
