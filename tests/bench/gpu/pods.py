"""vLLM in pods, scaled from zero by real KEDA: `python -m tests.bench.gpu.pods MODEL [--python PATH] [--packages FOLDER]`, as root.

MODEL is a file of `shapes/`; its weights and its tokenizer are written on this machine, from a seed. The cluster is the one
of `make cluster`, started here if none runs, and zerowake is installed by its chart, with gpumem. The image is made of this machine's own
Python and its packages, under the name that deploy/examples/gpu-engine.yaml has, and that file is applied as it stands; only afterwards is
KEDA told to wait less long before it scales down. Each figure is from the gateway's first request, at zero replicas, to the first token of
its streamed answer. In the same run the same pod is started cold without zerowake, and a pod that stays sleeps and is woken in its place
(`spec.idle`).

    --python PATH      the Python that vLLM is installed for (this one's own)
    --packages FOLDER  a folder of packages beside it, which is on the image's PYTHONPATH
    --work FOLDER      kept, with the model's files and the image: the next command takes them from there; one with --prepare ends with
                       them, and with the image on the node where the cluster runs
    --seconds S        after which no part is begun (540)
    --machine ROOT     where the machine's own file system is seen, for programs that run in another (/)
    --stand-in         no GPU and no vLLM: an engine of the tests with the same command line, and gpumem on the host's memory

Says what it does as it goes. Writes `tests/bench/results/pods-GPU-MODEL.json`, and logs into the folder OUT, where that is set.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from rich.console import Console

from tests.bench.cluster import events
from tests.bench.figures import Figure, table
from tests.bench.gpu.gpu_cluster import SYSTEM, cluster, gpumem_answers, gpus_on_node, keep_logs, kubectl, tell_all
from tests.bench.gpu.prepared import (
    COLD,
    COOLDOWN,
    MODELS,
    Machine,
    Prepared,
    container_of,
    example,
    scaled_as,
    served_name,
    volume,
    without_volumes,
    without_zerowake,
)
from tests.bench.gpu.results import keep
from tests.bench.restore import spread
from tests.bench.timeline import MOMENTS, PHASES, Recorder, Start, activations
from tests.e2e.api import Api, Object
from tests.e2e.cluster.control import import_archives, running
from tests.e2e.cluster.gpus import Gpus
from tests.e2e.cluster.images import IMAGES, build
from tests.e2e.cluster.layout import KUBECONFIG, NODE
from tests.e2e.release import Release, is_ready, to_install
from tests.worlds.model_shapes import SHAPES, Shape, shape_named

ROOT = Path(__file__).parents[3]
ROUNDS = 5
CAPTURE_SECONDS, COLD_SECONDS, SLEEP_SECONDS = 480, 300, 60
GRACE_SECONDS = 20.0  # that a part may take beyond the time that is left
GIB = 1 << 30
GOAL, IDLE_GOALS = 1.0, {"parked": 0.06, "standby": 0.42}
IDLE_SECONDS = 2
NO_VOLUMES = "staged, no volumes"
OURS = ("docker.io/library/zerowake-scaler:0.1.0", "docker.io/library/zerowake-agent:0.1.0")
QUESTION = {"prompt": "One, two, three,", "max_tokens": 16, "temperature": 0, "seed": 1, "logprobs": 1, "stream": True}
console = Console(width=220)
Answer = tuple[str, list[float]]  # text, log-probabilities


@dataclass
class Bench:
    """What is measured, on a cluster with zerowake and the models' namespace in it."""

    api: Api
    machine: Machine
    installed: Release
    models: Release  # its gateway, the namespace of the models
    name: str  # of the Deployment, the ModelSnapshot, the ScaledObject, and the engine's own of its model
    until: float  # time.monotonic(), after which nothing is begun
    figures: list[Figure] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    medians: dict[str, float] = field(default_factory=dict)
    starts: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    async def captured(self, objects: list[Object]) -> None:
        began = time.monotonic()
        await self.apply(*objects)
        await self.api.until("ModelSnapshot", MODELS, self.name, self.said_until_ready(began), CAPTURE_SECONDS)
        took = time.monotonic() - began
        for pod in await self.api.list("Pod", MODELS):  # the one that was captured has the GPU until it is gone
            await self.api.until("Pod", MODELS, pod["metadata"]["name"], lambda one: one is None)
        snapshot = await self.api.until("ModelSnapshot", MODELS, self.name, lambda one: one and one["status"].get("imageBytes"))
        assert snapshot
        words = ("get", "events", "--field-selector=reason=Captured", "-o=jsonpath={.items[*].message}")
        console.print(f"  {await self.models.run('kubectl', '-n', MODELS, *words)}", markup=False)
        pages = snapshot["status"]["imageBytes"] / 1e6
        self.figures.append(Figure("manifest applied → snapshot ready", took, "s", detail=f"its image: {pages:.0f} MB"))
        await self.models.run(
            "kubectl", "-n", MODELS, "patch", "scaledobject", self.name, "--type=merge", "-p", json.dumps({"spec": COOLDOWN})
        )

    def said_until_ready(self, began: float) -> Callable[[Object | None], bool]:
        """`is_ready`, which says what a snapshot's status says, when that changes: where the minutes of a capture go."""
        last: set[str] = set()

        def ready(one: Object | None) -> bool:
            status = (one or {}).get("status") or {}
            now = {f"{each['type']}: {each['reason']} {each['message']}" for each in status.get("conditions", [])}
            for line in sorted(now - last):
                console.print(f"  {time.monotonic() - began:.1f} s: {status.get('phase')}; {line}", markup=False)
            last.update(now)
            return is_ready(one)

        return ready

    async def staged(self) -> None:
        """The snapshot in memory, no process: a pod is made for each request."""
        await self.restored("staged")

    async def without_volumes(self, deployment: Object) -> None:
        await self.apply(without_volumes(deployment))
        await self.restored(NO_VOLUMES)
        await self.apply(deployment)

    async def restored(self, case: str) -> None:
        starts, used = await self.rounds(self.name, ROUNDS)
        told = await events(self.models, [start.pod for start in starts])
        for start in starts:
            console.print(f"  {told[start.pod]}", markup=False)
        if others := {pod: each for pod, each in told.items() if not each.startswith("Restored")}:
            raise AssertionError(f"these pods were not restored: {others}")
        if len(set(map(str, self.answers))) != 1:
            raise AssertionError(f"restored engines answer differently: {self.answers}")
        self.tell(case, starts, None if self.machine.gpus is None else GOAL)
        grown = (max(used) - min(used)) / 1e6
        name = f"{case}: GPU memory at zero replicas, most less least"
        self.figures.append(Figure(name, grown, "MB", at_most=64, detail=f"{len(used)} looks"))

    async def idle(self, rung: str) -> None:
        """A pod that KEDA keeps, whose engine sleeps in it and is woken in its place."""
        await self.api.merge("ScaledObject", MODELS, self.name, {"spec": {"minReplicaCount": 1}})
        await self.api.merge("ModelSnapshot", MODELS, self.name, {"spec": {"idle": rung, "idleSeconds": IDLE_SECONDS}})
        taken, awake, used, answers = [], [], 0, []
        before = await self.slept()
        for number in range(ROUNDS + 1):  # the first makes the pod
            begun, answered, answer = await self.asked(self.name)
            answers.append(answer)
            if number:
                taken.append(answered - begun)
                begun, answered, answer = await self.asked(self.name)
                awake.append(answered - begun)  # what of it is the engine's own
                answers.append(answer)
                console.print(f"  {rung} {number}: first token {taken[-1]:.3f} s; awake {awake[-1]:.3f}")
            await self.asleep(False)
            await self.asleep(True)
            async with asyncio.timeout(SLEEP_SECONDS):
                while await self.slept() <= before + number:
                    await asyncio.sleep(0.1)
            used = self.machine.used()
        case = f"pod idle, {rung}"
        self.medians[case] = statistics.median(taken)
        detail = f"{spread(taken)}; asked again, awake: {statistics.median(awake):.3f} s"
        detail += f"; asleep, {used / 1e6:.0f} MB are in use on the GPUs, gpumem's own in it"
        goal = None if self.machine.gpus is None else IDLE_GOALS[rung]
        self.figures.append(Figure(f"{case}: request → first token", self.medians[case], "s", at_most=goal, detail=detail))
        if any(answer != self.answers[0] for answer in answers):
            raise AssertionError(f"woken, it answers {answers}, and restored {self.answers[0]}")
        await self.api.merge("ModelSnapshot", MODELS, self.name, {"spec": {"idle": "drop"}})
        await self.api.merge("ScaledObject", MODELS, self.name, {"spec": {"minReplicaCount": 0}})

    async def asleep(self, whether: bool) -> None:
        await self.api.until(
            "ModelSnapshot", MODELS, self.name, lambda one: one and bool(one["status"].get("asleep")) == whether, CAPTURE_SECONDS
        )

    async def slept(self) -> int:
        """How many times engines have fallen asleep. One counts as asleep from when nothing is sent to it; its suspend takes longer."""
        agent = (await self.installed.agents(NODE))[0]
        return (await self.api.log_of(SYSTEM, agent["metadata"]["name"], "agent")).count(": Slept: ")

    async def cold(self, deployment: Object, scaled: Object) -> None:
        """The same pod, which the agent leaves alone: the engine as it is in its image, with GPU memory of its own."""
        await self.apply(without_zerowake(deployment), scaled_as(scaled, COLD))
        starts, _ = await self.rounds(COLD, 1)
        self.tell("plain engine, cold", starts)
        same = float(self.answers[-1] == self.answers[0])
        self.figures.append(Figure("plain engine's answer is the same", same, "", detail="vLLM has two, from start to start"))
        self.figures.append(Figure("cold ÷ staged", self.medians["plain engine, cold"] / self.medians["staged"], "×"))

    async def rounds(self, model: str, count: int) -> tuple[list[Start], list[int]]:
        """Starts from zero, and what was in use of the GPUs before each and after the last."""
        starts, used = [], []
        async with Recorder.following(self.api, MODELS) as recorder:
            for number in range(count):
                await self.models.at_zero(model)
                used.append(self.machine.used())
                start, answer = await self.once(recorder, model)
                self.answers.append(answer)
                starts.append(start)
                console.print(f"  {model} {number + 1}: first token {start.answered - start.asked:.3f} s, in pod {start.pod}")
            await self.models.at_zero(model)
            used.append(self.machine.used())
            recorder.complete(starts, await activations(self.api, SYSTEM, model))
        return starts, used

    async def once(self, recorder: Recorder, model: str) -> tuple[Start, Answer]:
        begun, answered, answer = await self.asked(model)
        return recorder.start(model, begun, answered), answer

    async def asked(self, model: str) -> tuple[float, float, Answer]:
        """When it was asked, and when the first token came, on the machine's clock."""
        url, question = f"{self.models.url}/v1/completions", QUESTION | {"model": model}
        tokens: list[tuple[str, list[float]]] = []
        answered = 0.0
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=COLD_SECONDS)) as client:
            asked = time.time()
            async with client.post(url, json=question) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        answered = answered or time.time()
                        choice = json.loads(line[6:])["choices"][0]
                        tokens.append((choice["text"], [round(each, 2) for each in (choice["logprobs"] or {}).get("token_logprobs", [])]))
                if response.status != 200 or not tokens:
                    raise AssertionError(f"{model} was answered {response.status}: {await response.text()}")
        answer = "".join(text for text, _ in tokens), [number for _, numbers in tokens for number in numbers]
        return asked, answered, answer

    def tell(self, case: str, starts: list[Start], at_most: float | None = None) -> None:
        taken = [start.answered - start.asked for start in starts]
        self.medians[case] = statistics.median(taken)
        self.figures.append(Figure(f"pod, {case}: request → first token", self.medians[case], "s", at_most=at_most, detail=spread(taken)))
        phases = [start.phases() for start in starts]
        for moment in MOMENTS:
            middle = 1000 * statistics.median(each[moment] for each in phases)
            self.figures.append(Figure(f"  {case}: {PHASES[moment]}", middle, "ms"))
        self.starts[case] = [{name: round(seconds, 4) for name, seconds in each.items()} for each in phases]
        parts = [start.activation.get("phases", {}) for start in starts]
        console.print(f"  the gateway's activations: {parts}", markup=False)

    async def apply(self, *objects: Object) -> None:
        listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        await asyncio.to_thread(subprocess.run, kubectl("-n", MODELS, "apply", "-f", "-"), input=listed, text=True, check=True)

    async def step(self, name: str, work: Callable[[], Awaitable[None]], seconds: float) -> bool:
        """Says how a part ended, and what the cluster says where it failed. What may take longer than is left is not begun."""
        began = time.monotonic()
        if self.until - began < seconds:
            console.print(f"=== {name}: not begun, {self.until - began:.0f} s are left, and it may take {seconds:.0f}")
            return False
        console.print(f"=== {name} ({self.until - began:.0f} s left)")
        try:
            async with asyncio.timeout(self.until - began + GRACE_SECONDS):
                await work()
        except Exception:
            console.print(traceback.format_exc()[-5000:], markup=False)
            tell_all()
            self.figures.append(Figure(f"{name}: failed", 1, "", at_most=0))
            return False
        console.print(f"=== {name}: {time.monotonic() - began:.1f} s")
        return True


async def measure(machine: Machine, prepared: Prepared, until: float, keep: Callable[[Bench], None]) -> Bench:
    """`keep` is called after each part."""
    stand_in = machine.gpus is None
    deployment, snapshot, scaled = example(stand_in)
    began = time.monotonic()
    await asyncio.to_thread(lambda: import_archives([*ours(), prepared.image]))
    console.print(f"the images are on the node after {time.monotonic() - began:.1f} s")
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(Api.connect(str(KUBECONFIG)))
        for name in (SYSTEM, MODELS):
            await api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
            await api.until("ServiceAccount", name, "default", lambda one: one)
        labels = {"nvidia.com/gpu.present": "true"}
        await api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": labels}})
        await stack.enter_async_context(gpus_on_node(api, machine))
        stack.push_async_callback(gone, api)
        installed = await stack.enter_async_context(to_install(api, str(KUBECONFIG), SYSTEM))
        models = Release(api, str(KUBECONFIG), MODELS, "")
        bench = Bench(api, machine, installed, models, deployment["metadata"]["name"], until)
        assert served_name(container_of(deployment)) == bench.name
        stack.push_async_callback(removed, bench)
        runtime: Object = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"}
        await bench.apply(runtime, *volume(prepared.models))
        size = prepared.weights // GIB
        reserve, arena = ("512MiB", "256MiB") if stand_in else (f"{size + 12}GiB", f"{size + 2}GiB")
        options = f"gpumem.enabled=true,gpumem.runtimeClassName=nvidia,gpumem.reserve={reserve},gpumem.arena={arena}"
        await installed.helm_upgrade(f"--set={options}")
        await gpumem_answers(installed)
        await installed.find_gateway()
        models.url = installed.url
        console.print(f"zerowake is installed after {time.monotonic() - began:.1f} s; {options}")
        if await bench.step("captured", lambda: bench.captured([deployment, snapshot, scaled]), 60):
            parts: list[tuple[str, Callable[[], Awaitable[None]], float]] = [
                ("staged", bench.staged, 40),
                *((f"idle: {rung}", functools.partial(bench.idle, rung), 40) for rung in IDLE_GOALS),
                (NO_VOLUMES, functools.partial(bench.without_volumes, deployment), 40),
                ("plain engine", lambda: bench.cold(deployment, scaled), 20 if stand_in else 90),
            ]
            for name, part, seconds in parts:
                await bench.step(name, part, seconds)
                keep(bench)
        keep_logs()
    return bench


async def removed(bench: Bench) -> None:
    """The models' objects, before zerowake."""
    for kind in ("ScaledObject", "Deployment", "ModelSnapshot", "Pod"):
        for one in await bench.api.list(kind, MODELS):
            await bench.api.delete(kind, MODELS, one["metadata"]["name"])
            await bench.api.until(kind, MODELS, one["metadata"]["name"], lambda found: found is None, within=120)


async def gone(api: Api) -> None:
    """Until zerowake's own pods have ended: gpumem's has the GPU's memory so long."""
    for pod in await api.list("Pod", SYSTEM):
        await api.until("Pod", SYSTEM, pod["metadata"]["name"], lambda found: found is None, within=60)


def ours() -> list[Path]:
    """zerowake's own images."""
    build()
    return [image.archive for image in IMAGES if image.name in OURS]


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu.pods", allow_abbrev=False)
    parser.add_argument("model", nargs="?", metavar="MODEL", choices=SHAPES, help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--machine", type=Path, default=Path("/"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--stand-in", action="store_true")
    found = parser.parse_args()
    if not (found.model or found.stand_in):
        parser.error("MODEL is missing; without a GPU there is --stand-in")
    if found.prepare and not found.work:
        parser.error("--prepare is for a folder that is kept: --work FOLDER")
    return found


def main() -> int:
    until = time.monotonic()
    words = asked()
    until += words.seconds
    machine = Machine(words.machine, words.python, words.packages, None if words.stand_in else Gpus.of(words.machine))
    shape = None if words.stand_in else shape_named(words.model)
    before = machine.used()
    with contextlib.ExitStack() as stack:
        if words.work:
            work: Path = words.work.resolve()
            work.mkdir(parents=True, exist_ok=True)
        else:
            folder = os.environ.get("ZEROWAKE_GPU_WORK", "/var/tmp")
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zerowake-pods-", dir=folder)))
        prepared = Prepared.within(work, machine, shape)
        if words.prepare:
            if running():
                import_archives([prepared.image])
            return 0
        stack.enter_context(cluster())
        bench = asyncio.run(measure(machine, prepared, until, functools.partial(keep_figures, machine, shape)))
    left = (machine.used() - before) / 1e6
    bench.figures.append(Figure("GPU memory left over", left, "MB", at_most=64, detail="after everything has ended"))
    console.print(table(bench.figures))
    keep_figures(machine, shape, bench)
    return 1 if any(figure.met is False for figure in bench.figures) else 0


def keep_figures(machine: Machine, shape: Shape | None, bench: Bench) -> None:
    """Of a GPU's run; the stand-in's figures are nobody's."""
    if shape:
        command = f"python -m tests.bench.gpu.pods {shape.name}"
        path = keep(f"pods-GPU-{shape.name}", command, machine.named(), bench.figures, model=shape.config, starts=bench.starts)
        if out := os.environ.get("OUT"):
            shutil.copy(path, out)


if __name__ == "__main__":
    sys.exit(main())
