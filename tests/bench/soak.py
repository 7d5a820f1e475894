"""Restores for an hour: whatever could grow, minute by minute.

    python -m tests.bench.soak [--minutes 60] [--keep]

One machine with `zerowake up`, gpumem, and two snapshots: the demo's embeddings engine with its weights in gpumem, and a server with
threads, a child process, shared memory and mapped files, whose answer is a hash of all its memory. Each has two models, and each model is
asked at zero, has to answer from a restored replica what was answered at first, and goes back to zero, over and over. Each minute, at zero:
memory, descriptors and threads of scaler, agent and gpumem, processes, mounts, namespaces, control groups, and files in the state folder.

The verdict is by the slope of a line through the minutes, without the first tenth of them: a count may rise by less than one in a hundred
restores, memory by less than five percent of itself in an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from rich.console import Console

from gpumem.hardware.memory import HOST
from tests.bench.figures import Figure
from tests.bench.restore import DEMO, PORT, ZEROWAKE, status
from tests.bench.shown import shown
from tests.bench.slope import Sample, rise
from tests.worlds.device import World
from tests.worlds.ports import free_port
from tests.worlds.processes import below, descriptors, resident

SERVER = Path(__file__).parents[1] / "worlds" / "hashing_engine.py"
MOST_PERCENT = 5.0  # of its memory, in an hour
MOST_A_RESTORE = 0.01
_REST_SECONDS = 5.0  # for what goes at zero to have gone
_MODELS = {"sum-1": "sum", "sum-2": "sum", "embed-1": "embed", "embed-2": "embed"}  # and their snapshots
_PATHS = {"sum": "sum", "embed": "v1/embeddings"}
_TEXTS = {"input": ["From nothing to an answer.", "And back."]}


class Wrong(Exception):
    """An answer was not the first one's, or its replica was not restored."""


class System:
    """The processes, and the state folder."""

    def __init__(self, up: asyncio.subprocess.Process, gpumem: int, state: Path, url: str) -> None:
        self.up = up
        self.gpumem = gpumem
        self.state = state
        self.url = url

    @property
    def agent(self) -> int:
        return next(pid for _, pid, words in below(self.up.pid) if " agent " in f"{words} " and str(self.state) in words)

    async def at_zero(self, model: str) -> None:
        """Returns when no replica is wanted, and none is left."""
        async with asyncio.timeout(60):
            while await self._stands(model):
                await asyncio.sleep(0.05)

    async def _stands(self, model: str) -> bool:
        connector = aiohttp.UnixConnector(str(self.state / "status.sock"))
        async with aiohttp.ClientSession(connector=connector) as http, http.get("http://zerowake/") as response:
            found = await response.json()
        counted = next(each for each in found["models"] if each["name"] == model)
        return bool(counted["wanted"] or counted["ready"] or model in [replica["model"] for replica in found["replicas"]])

    def counts(self) -> dict[str, int]:
        """What there is now; every count is of this system alone, whatever else runs on the machine."""
        agent = self.agent
        found: dict[str, int] = {}
        for name, pid in {"scaler": self.up.pid, "agent": agent, "gpumem": self.gpumem}.items():
            found[f"{name}: memory"] = resident(pid)
            found[f"{name}: descriptors"] = len(descriptors(pid))
            found[f"{name}: threads"] = len(list(Path(f"/proc/{pid}/task").iterdir()))
        pids = [self.up.pid, *(pid for _, pid, _ in below(self.up.pid))]
        found["processes"] = len(pids)
        found["mounts"] = len(_read(f"/proc/{agent}/mounts").splitlines())
        found["namespaces"] = len(set(_namespaces(pids)))
        found["control groups"] = len(set(_read(f"/proc/{pid}/cgroup") for pid in pids))
        # As the agent sees it: its memory is mounted there for itself alone.
        found["files in the state folder"] = sum(len(files) for _, _, files in os.walk(f"/proc/{agent}/root{self.state}"))
        return found

    async def settled(self) -> dict[str, int]:
        """The counts at zero, once they stay: what is on its way out has so many seconds."""
        deadline = time.monotonic() + _REST_SECONDS
        before: dict[str, int] = {}
        while True:
            now = self.counts()
            if not _differ(now, before) or time.monotonic() > deadline:
                return now
            before = now
            await asyncio.sleep(1)


def _differ(now: dict[str, int], before: dict[str, int]) -> bool:
    return any(now[name] != before.get(name) for name in now if not name.endswith("memory"))


def _namespaces(pids: list[int]) -> Iterator[str]:
    for pid in pids:
        for kind in ("pid", "mnt", "net", "ipc", "uts", "cgroup", "user"):
            with suppress(OSError):
                yield str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""


async def _run(command: list[str], env: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; why stands above")


@asynccontextmanager
async def _system(folder: Path, gpumem: World, pid: int) -> AsyncIterator[System]:
    state, port, file = folder / "state", free_port(), folder / "up.yaml"
    env = os.environ | {"GPUMEM_SOCKET": str(gpumem.socket)}
    (folder / "weights.bin").write_bytes(os.urandom(1 << 20))
    create = [*ZEROWAKE, "snapshot", "create"]
    here = ["--state", str(state), "--port", str(PORT)]
    server = [sys.executable, str(SERVER), str(PORT), "8", str(folder / "weights.bin"), "--child"]
    await _run([*create, "sum", *here, "--canary", "/sum", "--", *server], env)
    await _run([*create, "embed", *here, "--", sys.executable, str(DEMO / "embeddings.py"), "--port", str(PORT)], env)
    models = {name: {"snapshot": snapshot, "cooldown_seconds": 0.2, "polling_seconds": 0.2} for name, snapshot in _MODELS.items()}
    file.write_text(yaml.safe_dump({"state": str(state), "listen": f"127.0.0.1:{port}", "models": models}))
    with (folder / "up.log").open("wb") as log:
        up = await asyncio.create_subprocess_exec(*ZEROWAKE, "up", str(file), stdout=log, stderr=log, env=env)
    try:
        async with asyncio.timeout(60):
            while [model["rung"] for model in (await status(state))["models"]] != ["memory"] * len(_MODELS):
                await asyncio.sleep(0.1)
        yield System(up, pid, state, f"http://127.0.0.1:{port}")
    finally:
        up.terminate()
        await up.wait()


class Asker:
    """Asks each model in turn, and compares."""

    def __init__(self, system: System, http: aiohttp.ClientSession) -> None:
        self._system = system
        self._http = http
        self._first: dict[str, Any] = {}
        self.seconds: list[float] = []

    async def cycle(self, model: str) -> None:
        """0 → 1 → 0. Raises: Wrong."""
        snapshot = _MODELS[model]
        url, body = f"{self._system.url}/models/{model}/{_PATHS[snapshot]}", _TEXTS if snapshot == "embed" else None
        began = time.monotonic()
        async with self._http.request("POST" if body else "GET", url, json=body) as response:
            answer = await response.text()
            origin = response.headers.get("X-Zerowake-Origin")
        self.seconds.append(time.monotonic() - began)
        if response.status != 200 or origin != "restored":
            raise Wrong(f"{model}: status {response.status}, from a replica that was {origin}: {answer[:200]}")
        said = json.loads(answer).get("digest") or json.loads(answer)["data"]
        if said != self._first.setdefault(snapshot, said):
            raise Wrong(f"{model}: the answer is not the first one's")
        await self._system.at_zero(model)

    async def cycles(self, until: float) -> None:
        """With all models beside each other, one cycle of each at least. until: of time.monotonic(). Raises: Wrong."""

        async def of(model: str) -> None:
            await self.cycle(model)
            while time.monotonic() < until:
                await self.cycle(model)

        async with asyncio.TaskGroup() as group:
            for model in _MODELS:
                group.create_task(of(model))


async def _soak(console: Console, folder: Path, gpumem: World, pid: int, minutes: float) -> tuple[list[Figure], dict[str, object]]:
    samples: list[Sample] = []
    wrong = ""
    async with (
        _system(folder, gpumem, pid) as system,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
    ):
        asker = Asker(system, http)
        await asker.cycles(0.0)
        began = time.monotonic()
        while True:
            counts = await system.settled()
            minute = (time.monotonic() - began) / 60
            samples.append(Sample(minute, counts | {"restores": len(asker.seconds)}))
            console.print(f"minute {minute:5.1f}: {json.dumps(samples[-1].values)}")
            if minute >= minutes:
                break
            until = time.monotonic() + 60 - (time.monotonic() - began) % 60
            try:
                await asker.cycles(until)
            except* (Wrong, TimeoutError, aiohttp.ClientError) as errors:
                wrong = f"after {len(asker.seconds)} restores: {errors.exceptions[0]!r}"
                console.print(wrong, markup=False, style="red")
            if wrong:
                break
    return list(_figures(samples, asker.seconds, wrong)), {"minutes": [{"minute": each.minute} | dict(each.values) for each in samples]}


def _figures(samples: list[Sample], seconds: list[float], wrong: str) -> Iterator[Figure]:
    ran = samples[-1].minute
    restores = samples[-1].values["restores"]
    yield Figure("minutes", ran, "min", detail=wrong or "without an error")
    middle, last = sorted(seconds)[len(seconds) // 2], sorted(seconds)[len(seconds) * 99 // 100]
    yield Figure("restores, each answered as at first", restores, "restores", detail=f"median {middle:.3f} s, p99 {last:.3f} s")
    yield Figure("restores that went wrong", float(bool(wrong)), "restores", at_most=0, detail=wrong)
    judged = [each for each in samples if each.minute >= ran / 10]
    for name in samples[0].values:
        if name == "restores":
            continue
        values = [each.values[name] for each in judged]
        if name.endswith("memory"):
            percent = 100 * rise(judged, name) * 60 / (sum(values) / len(values))
            detail = f"{values[0] / 1e6:.1f} MB → {values[-1] / 1e6:.1f} MB, {min(values) / 1e6:.1f} to {max(values) / 1e6:.1f}"
            yield Figure(f"{name}, rise in an hour", percent, "%", at_most=MOST_PERCENT, detail=detail)
        else:
            rate = rise(judged, "restores")
            each = rise(judged, name) / rate if rate else 0.0
            detail = f"{values[0]} → {values[-1]}, {min(values)} to {max(values)}"
            yield Figure(f"{name}, rise a restore", each, "", at_most=MOST_A_RESTORE, detail=detail)


def main_of_program() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description="restores for an hour, and whatever could grow")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--keep", action="store_true", help="in results/soak.json")
    given = parser.parse_args()
    if os.geteuid() != 0:
        print("restores need root: run it with sudo", file=sys.stderr)
        return 2
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="zerowake-soak-", dir="/var/tmp") as folder:
        gpumem = World(Path(folder), HOST)
        with gpumem.server(pool=256 << 20, arena=0):
            pid = next(pid for _, pid, words in below(os.getpid()) if str(gpumem.socket) in words)
            figures, more = asyncio.run(_soak(console, Path(folder), gpumem, pid, given.minutes))
    command = f"python -m tests.bench.soak --minutes {given.minutes:g}"
    return shown(console, figures, "soak" if given.keep else "", command, more)


if __name__ == "__main__":
    sys.exit(main_of_program())
