"""What a pod's start from zero is made of, as the cluster's own programs tell it: each moment on the one clock of the machine.

asked → pushed (gateway) → scaled (Deployment) → made (pod) → bound (scheduler) → sandbox asked, made → started (containerd)
      → restoring → restored (agent, by the gateway's activation) → first byte
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.layout import LOGS

MOMENTS = ("pushed", "scaled", "made", "bound", "sandbox asked", "sandbox made", "started", "restoring", "restored", "first byte")
PHASES = {
    "pushed": "gateway tells KEDA",
    "scaled": "KEDA scales the Deployment",
    "made": "controllers and webhook make the pod",
    "bound": "scheduler",
    "sandbox asked": "kubelet: volumes, cgroup",
    "sandbox made": "containerd and CNI: sandbox",
    "started": "containerd: container",
    "restoring": "placeholder found by the agent",
    "restored": "agent: CRIU and pages",
    "first byte": "gateway and engine: first answer",
}
_SANDBOX = re.compile(r'time="([^"]+)".*msg="RunPodSandbox for name:\\"([^\\]+)\\".*?(?:returns sandbox id \\"(\w+)\\")?"$')
_CONTAINER = re.compile(r'time="([^"]+)".*msg="CreateContainer within sandbox \\"(\w+)\\" for name:.* returns container id \\"(\w+)\\""')
_STARTED = re.compile(r'time="([^"]+)".*msg="StartContainer for \\"(\w+)\\" returns successfully"')


@dataclass
class Start:
    """One pod's, with a request that began it."""

    pod: str
    asked: float
    answered: float
    at: dict[str, float] = field(default_factory=dict)  # moments
    ready: float | None = None  # by the kubelet's word
    activation: dict[str, Any] = field(default_factory=dict)

    def phases(self) -> dict[str, float]:
        """Seconds. A moment that was told of late ends its phase, and the next one is the shorter for it."""
        last, found = self.asked, {}
        for moment in MOMENTS:
            now = min(self.answered, max(last, self.at.get(moment, last)))
            found[moment] = now - last
            last = now
        return found


class Recorder:
    """Follows Deployments and pods of a namespace."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._seen: dict[tuple[str, str], list[tuple[float, str]]] = {}  # (moment, model or pod) → when, which pod
        self._pods: dict[str, Object] = {}
        self._logs = {log: log.stat().st_size for log in LOGS.glob("containerd*.log")}  # each node's, and how long it was

    @classmethod
    @contextlib.asynccontextmanager
    async def following(cls, api: Api, namespace: str) -> AsyncIterator[Recorder]:
        recorder = cls(api, namespace)
        tasks = [asyncio.create_task(recorder._deployments()), asyncio.create_task(recorder._follow_pods())]
        try:
            yield recorder
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, moment: str, key: str, pod: str = "") -> None:
        self._seen.setdefault((moment, key), []).append((time.time(), pod))

    async def _deployments(self) -> None:
        before: dict[str, int] = {}
        async for _, one in self._api.watch("Deployment", self._namespace):
            name, replicas = one["metadata"]["name"], one["spec"].get("replicas", 0)
            if replicas > before.get(name, 0):
                self._note("scaled", name)
            before[name] = replicas

    async def _follow_pods(self) -> None:
        async for kind, one in self._api.watch("Pod", self._namespace):
            name, before = one["metadata"]["name"], self._pods.get(one["metadata"]["name"])
            self._pods[name] = one
            if before is None and kind == "ADDED":
                self._note("made", one["metadata"]["labels"].get("app", ""), name)
            if one["spec"].get("nodeName") and not (before or {}).get("spec", {}).get("nodeName"):
                self._note("bound", name)
            if condition(one, "Ready") and not condition(before, "Ready"):
                self._note("ready", name)

    def pods_since(self, model: str, asked: float) -> list[str]:
        """Those made for it since then, the first one first."""
        return [pod for when, pod in self._seen.get(("made", model), []) if when >= asked]

    def pod(self, name: str) -> Object:
        return self._pods[name]

    def start(self, model: str, asked: float, answered: float) -> Start:
        """Of the first pod that was made for the request."""
        start = Start(self.pods_since(model, asked)[0], asked, answered)
        for moment, key in (("scaled", model), ("made", model), ("bound", start.pod)):
            start.at[moment] = next(when for when, _ in self._seen[moment, key] if when >= asked)
        return start

    def complete(self, starts: Sequence[Start], activations: Sequence[dict[str, Any]]) -> None:
        """What logs tell: containerd's, and the gateways' activations."""
        told = self._containerd()
        for start in starts:
            start.at |= told.get(start.pod, {})
            start.ready = next((when for when, _ in self._seen.get(("ready", start.pod), [])), None)
            # The activation that ended while its client waited.
            start.activation = next((each for each in activations if start.asked <= each["ended"] <= start.answered + 0.5), {})
            if start.activation:
                phases, ended = start.activation["phases"], start.activation["ended"]
                began = ended - start.activation["seconds"]
                start.at["pushed"] = began + phases.get("held", 0) + phases.get("pushed", 0)
                start.at["restored"] = ended - phases.get("first_byte", 0)
                if "scheduled" in phases:
                    start.at["restoring"] = start.at["pushed"] + phases["scheduled"]
            start.at["first byte"] = start.answered

    def _containerd(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        sandboxes: dict[str, str] = {}
        containers: dict[str, str] = {}
        for line in self._lines():
            if match := _SANDBOX.search(line):
                when, pod, sandbox = match.groups()
                found.setdefault(pod, {})["sandbox made" if sandbox else "sandbox asked"] = clock(when)
                if sandbox:
                    sandboxes[sandbox] = pod
            elif (match := _CONTAINER.search(line)) and match[2] in sandboxes:
                containers[match[3]] = sandboxes[match[2]]
            elif (match := _STARTED.search(line)) and match[2] in containers:
                found[containers[match[2]]].setdefault("started", clock(match[1]))
        return found

    def _lines(self) -> Iterator[str]:
        for log, begin in self._logs.items():
            with log.open("rb") as file:
                file.seek(begin)
                yield from file.read().decode(errors="replace").splitlines()


async def activations(api: Api, namespace: str, model: str) -> list[dict[str, Any]]:
    """Of every gateway's log; `ended` is on the machine's clock."""
    found = []
    for pod in await api.list("Pod", namespace, "app.kubernetes.io/name=zerowake-scaler"):
        for line in (await api.log_of(namespace, pod["metadata"]["name"])).splitlines():
            with contextlib.suppress(ValueError):
                one = json.loads(line)
                if one.get("message") == "activation" and one["model"] == model and one["outcome"] == "served":
                    found.append({**one, "ended": clock(one["time"])})
    return found


def clock(when: str) -> float:
    # Nanoseconds are more than datetime reads.
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", when).replace("Z", "+00:00")).timestamp()
