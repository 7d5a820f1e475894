"""From zero to an answer on Kubernetes: real KEDA, a real kubelet, an engine restored inside its pod; and from zero to four at once.

The cluster of `make cluster`, zerowake as its chart installs it, the images of this checkout. Requests go from this machine to the
gateway's Service. In one run and in turn: the restored pod; the same Deployment with the annotation `zerowake.dev/restore: "false"`,
started cold; and `zerowake up` on this machine with a snapshot of the same engine, which has no Kubernetes in it: the difference is what
the cluster costs. Each request is the only one, after KEDA has scaled to zero and the pod before is gone. The engine's answer is a hash
over all its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.bench.__main__ import RESULTS, keep
from tests.bench.figures import Figure
from tests.bench.restore import ZEROWAKE, at_zero, run, system
from tests.bench.timeline import MOMENTS, PHASES, Recorder, Start, activations, clock
from tests.e2e.api import Api, Object
from tests.e2e.cluster.control import NOT_RUNNING, ControlError, current, import_archives, running
from tests.e2e.cluster.images import build
from tests.e2e.cluster.layout import KUBECONFIG
from tests.e2e.release import MODEL, Release, deployment, own_namespace, release

ROUNDS, COLD_ROUNDS, SURGES = 30, 10, 5
COLD = "cold"
REPLICAS, BACKLOG = 4, 24
OUTCOMES = ("Restored", "RestoreFailed", "SnapshotRefused", "ColdStarted")
SERVER = Path(__file__).parents[1] / "worlds" / "hashing_engine.py"


def unavailable() -> str:
    """Why this cannot be measured here; empty: it can."""
    return "" if running() else NOT_RUNNING


@dataclass
class Measured:
    restored: list[Start] = field(default_factory=list)
    cold: list[Start] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    surges: list[list[float]] = field(default_factory=list)  # when each of the replicas answered first, in seconds
    process: dict[str, Any] = field(default_factory=dict)


async def main() -> list[Figure]:
    if reason := unavailable():
        raise ControlError(reason)
    await asyncio.to_thread(lambda: import_archives(build()))
    measured = Measured()
    async with (
        Api.connect(str(KUBECONFIG)) as api,
        own_namespace(api, "bench") as namespace,
        release(api, str(KUBECONFIG), namespace) as installed,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as client,
        single_machine() as single,
    ):
        await installed.model()
        await api.apply(deployment(COLD, {"zerowake.dev/restore": "false", "zerowake.dev/model": COLD}), namespace=namespace)
        await installed.scaled(COLD)
        async with Recorder.following(api, namespace) as recorder:
            await in_turn(installed, client, single, recorder, measured)
            recorder.complete(measured.restored, await activations(api, namespace, MODEL))
            recorder.complete(measured.cold, await activations(api, namespace, COLD))
        await api.delete("ScaledObject", namespace, COLD)
        await installed.scaled(MODEL, maxReplicaCount=REPLICAS)
        async with Recorder.following(api, namespace) as recorder:
            for _ in range(SURGES):
                measured.surges.append(await surge(installed, client, recorder))
                await installed.at_zero()
    found = figures(measured)
    keep(found, RESULTS / "cluster.json", "python -m tests.bench cluster", details(measured))
    return found


async def in_turn(installed: Release, client: aiohttp.ClientSession, single: Single, recorder: Recorder, measured: Measured) -> None:
    """A round before those that count warms what any node in use has warm."""
    answers = set()
    for number in range(ROUNDS + 1):
        start, answer = await once(installed, client, recorder, MODEL)
        answers.add(answer)
        if number == ROUNDS:
            measured.process = await asyncio.to_thread(process_in, recorder.pod(start.pod))
            measured.process["requests it has had, those before the dump included"] = (await installed.ask(client, path="/count"))["count"]
        await installed.at_zero()
        seconds, _ = await single.once(client)
        if number:
            measured.restored.append(start)
            measured.single.append(seconds)
        if number % (ROUNDS // COLD_ROUNDS) == 0:
            start, answer = await once(installed, client, recorder, COLD)
            answers.add(answer)
            await installed.at_zero(COLD)
            if number:
                measured.cold.append(start)
    told = await events(installed, [start.pod for start in measured.restored])
    measured.process["agent's event"] = told[measured.restored[-1].pod]
    measured.process["pods restored, by their events"] = sum(each.startswith("Restored") for each in told.values())
    if others := {pod: each for pod, each in told.items() if not each.startswith(("Restored", "no event"))}:
        raise AssertionError(f"these pods were not restored: {others}")
    if len(answers) != 1:
        raise AssertionError(f"restored and cold engines answer differently: {answers}")
    measured.process["answer, the cold one's too"] = answers.pop()


async def once(installed: Release, client: aiohttp.ClientSession, recorder: Recorder, model: str) -> tuple[Start, str]:
    asked = time.time()
    async with client.get(f"{installed.url}/models/{model}/sum") as response:
        answered, answer = time.time(), await response.text()
    if response.status != 200:
        raise AssertionError(f"{model} was answered {response.status}: {answer}")
    return recorder.start(model, asked, answered), json.loads(answer)["digest"]


async def surge(installed: Release, client: aiohttp.ClientSession, recorder: Recorder) -> list[float]:
    """A backlog worth four replicas in one instant: seconds until each pod began its first answer, the kubelet's clock for its log."""
    asked = time.time()
    await asyncio.gather(*(installed.ask(client) for _ in range(BACKLOG)))
    found: list[float] = []
    deadline = time.time() + 60
    while len(found) < REPLICAS and time.time() < deadline:
        # What is left of the backlog is soon worked off by the first ones: more keeps the others wanted until each has answered.
        await asyncio.gather(*(installed.ask(client) for _ in range(REPLICAS)))
        firsts = await asyncio.gather(*(first_answer(installed, pod) for pod in recorder.pods_since(MODEL, asked)))
        found = sorted(first - asked for first in firsts if first)
    if len(found) < REPLICAS:
        raise AssertionError(f"{len(found)} of {REPLICAS} replicas answered within a minute")
    return found


async def first_answer(installed: Release, pod: str) -> float | None:
    """The moment of its first real answer, by its log. Capture and health checks are asked for otherwise, or of another pod."""
    for line in (await installed.api.log_of(installed.namespace, pod, timestamps=True)).splitlines():
        when, _, said = line.partition(" ")
        if "GET /sum" in said:
            return clock(when)
    return None


# The same engine without Kubernetes.


@dataclass
class Single:
    url: str
    state: Path

    async def once(self, client: aiohttp.ClientSession) -> tuple[float, str]:
        began = time.monotonic()
        async with client.get(f"{self.url}/models/chat/sum") as response:
            seconds, answer = time.monotonic() - began, await response.text()
        if response.status != 200:
            raise AssertionError(f"`zerowake up` answered {response.status}: {answer}")
        await at_zero(self.state)
        return seconds, json.loads(answer)["digest"]


@contextlib.asynccontextmanager
async def single_machine() -> AsyncIterator[Single]:
    with tempfile.TemporaryDirectory(prefix="zerowake-bench-", dir="/var/tmp") as folder:
        state, mapped = Path(folder, "state"), Path(folder, "mapped")
        mapped.write_bytes(os.urandom(1 << 20))
        engine = [sys.executable, "-u", str(SERVER), "8000", "16", str(mapped)]
        await run(*ZEROWAKE, "snapshot", "create", "chat", "--state", str(state), "--port", "8000", "--canary", "/sum", "--", *engine)
        async with system(state) as url:
            yield Single(url, state)


# Who answers.


def process_in(pod: Object) -> dict[str, Any]:
    """The engine's process, as the kernel shows it: whose child it is, in whose control groups."""
    uid = pod["metadata"]["uid"]
    groups = Path("/sys/fs/cgroup/cpu") / current().cgroup.lstrip("/")
    if not groups.exists():
        groups = Path("/sys/fs/cgroup") / current().cgroup.lstrip("/")
    files = [file for file in groups.rglob("cgroup.procs") if uid in str(file).replace("_", "-")]
    pids = [pid for file in files for pid in file.read_text().split()]
    for pid in pids:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        if b"/server.py" not in command or command[0].endswith(b"zerowake-placeholder"):
            continue
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        return {
            "pid on the machine, the node, in the pod": status["NSpid"].split(),
            "command": b" ".join(command).decode(),
            "its parent": Path(f"/proc/{status['PPid']}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(),
            "cgroup": next(line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if uid in line.replace("_", "-")),
            "pod": f"{pod['metadata']['namespace']}/{pod['metadata']['name']}, uid {uid}",
        }
    raise AssertionError(f"no engine in the control groups of pod {uid}: {pids}")


async def events(installed: Release, pods: Sequence[str]) -> dict[str, str]:
    """What the agent did with each of the pods. They are written while the first answer is on its way, and none depends on them."""
    every = await installed.api.list("Event", installed.namespace)
    told = {each["involvedObject"]["name"]: f"{each['reason']}: {each['message']}" for each in every if each["reason"] in OUTCOMES}
    return {pod: told.get(pod, "no event") for pod in pods}


# What comes of it.


def at(part: float, values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * len(ordered)))]


def figures(measured: Measured) -> list[Figure]:
    whole = [start.answered - start.asked for start in measured.restored]
    cold = [start.answered - start.asked for start in measured.cold]
    ready = [start.ready - start.answered for start in measured.restored if start.ready]
    middle, single = at(0.5, whole), statistics.median(measured.single)
    rounds = f"{len(whole)} rounds; least {min(whole):.2f}, worst {max(whole):.2f} s"
    found = [
        Figure("cluster: request → first byte from zero, p50", middle, "s", detail=rounds),
        Figure("cluster: request → first byte from zero, p99", at(0.99, whole), "s", detail=rounds),
        Figure(
            "the same on one machine (zerowake up), p50",
            single,
            "s",
            detail=f"worst {max(measured.single):.2f} s; in turn with the cluster",
        ),
        Figure("what the cluster adds, p50", middle - single, "s", at_most=0.6),
        Figure("the same Deployment started cold, p50", at(0.5, cold), "s", detail=f"{len(cold)} rounds; worst {max(cold):.2f} s"),
        Figure(
            "answer → Ready by the kubelet's word, p50",
            at(0.5, ready or [0]),
            "s",
            detail="its probe and status; requests don't wait for it",
        ),
    ]
    parts = {moment: [start.phases()[moment] for start in measured.restored] for moment in MOMENTS}
    colds = {moment: [start.phases()[moment] for start in measured.cold] for moment in MOMENTS}
    for moment, values in parts.items():
        beside = f"p99 {1000 * at(0.99, values):.0f} ms; cold {1000 * at(0.5, colds[moment]):.0f} ms"
        found.append(Figure(f"  {PHASES[moment]}, p50", 1000 * at(0.5, values), "ms", detail=beside))
    last = [each[REPLICAS - 1] for each in measured.surges]
    detail = "each: " + "; ".join(" ".join(f"{seconds:.2f}" for seconds in each) for each in measured.surges)
    found.append(Figure(f"0 → {REPLICAS}: all of them answer, p50", statistics.median(last), "s", at_most=2.0, detail=detail))
    found.append(Figure(f"0 → {REPLICAS}: all of them answer, worst", max(last), "s", at_most=2.0))
    return found


def details(measured: Measured) -> dict[str, Any]:
    def told(starts: Sequence[Start]) -> list[dict[str, float]]:
        return [{name: round(seconds, 4) for name, seconds in start.phases().items()} for start in starts]

    return {"process": measured.process, "restored": told(measured.restored), "cold": told(measured.cold), "single": measured.single}
