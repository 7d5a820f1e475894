"""zerowake as its chart installs it, a model that KEDA scales there, and its gateway: what tests and benchmarks of the whole share."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.e2e.api import Api, Object, condition
from tests.e2e.chart import CHART, CRD, run

IMAGES = "scaler.image.pullPolicy=Never,agent.image.pullPolicy=Never,scaler.resources.requests.cpu=50m"
ENGINE = {
    "name": "engine",
    "image": "zerowake.test/engine:1",
    "imagePullPolicy": "Never",
    "args": ["8000", "16", "/mapped"],
    "ports": [{"name": "http", "containerPort": 8000}],
}
MODEL = "chat"


class Installed(Exception):
    """Another release is in the cluster; there is room for one."""


@dataclass
class Release:
    api: Api
    kubeconfig: str
    namespace: str
    url: str  # of the gateway

    async def ask(self, client: aiohttp.ClientSession, model: str = MODEL, path: str = "/sum") -> Any:
        """The engine's answer. Raises: AssertionError unless it is a 200."""
        async with client.get(f"{self.url}/models/{model}{path}") as response:
            answer = await response.text()
            assert response.status == 200, f"{response.status}: {answer}"
            return json.loads(answer)

    async def helm_upgrade(self, *options: str) -> str:
        """The chart's notes."""
        command = ("helm", "upgrade", "--install", "zerowake", str(CHART), "-n", self.namespace, f"--set={IMAGES}", *options)
        return await self.run(*command, "--wait", "--timeout=3m")

    async def helm_uninstall(self, *options: str) -> None:
        await self.run("helm", "uninstall", "zerowake", "-n", self.namespace, *options, "--wait", "--timeout=4m")

    async def find_gateway(self) -> None:
        service = await self.api.get("Service", self.namespace, "zerowake")
        self.url = f"http://{service['spec']['clusterIP']}"

    async def run(self, *command: str) -> str:
        """kubectl's or helm's output."""
        return await asyncio.to_thread(run, self.kubeconfig, *command)

    async def pods(self, app: str) -> list[Object]:
        """Of ours: zerowake-scaler, zerowake-agent."""
        return await self.api.list("Pod", self.namespace, f"app.kubernetes.io/name={app}")

    async def agents(self, *nodes: str) -> list[Object]:
        """The agents' pods on these nodes, but for those that are being deleted."""
        there = [pod for pod in await self.pods("zerowake-agent") if not pod["metadata"].get("deletionTimestamp")]
        return [pod for pod in there if pod["spec"].get("nodeName") in nodes]

    async def holders(self, name: str = MODEL) -> list[str]:
        """The nodes that have the snapshot, by the word of its ModelSnapshot: not those whose agents are silent."""
        found = await self.api.get("ModelSnapshot", self.namespace, name)
        locations = (found.get("status") or {}).get("locations", [])
        return [each["name"] for each in locations if each["rung"] not in ("store", "unknown")]

    async def take_off(self, node: str, name: str) -> None:
        """The snapshot, off the node."""
        await self.on_agent(node, "rm", name, f"--namespace={self.namespace}")

    async def on_agent(self, node: str, *words: str) -> str:
        """What `zerowake snapshot` says there."""
        (agent,) = await self.agents(node)
        inside = ("exec", agent["metadata"]["name"], "-c", "agent", "--", "zerowake", "snapshot", *words)
        return await self.run("kubectl", "-n", self.namespace, *inside)

    async def at_zero(self, model: str = MODEL) -> None:
        """Until KEDA has scaled it down, its pods are gone, and it stayed so meanwhile.

        With a cooldown below the three seconds between two pushes, KEDA may scale it down in the moment in which it is told that it was
        in use, and makes one pod more. Kubernetes' own controllers may look again a minute after the API server is back.
        """
        async with asyncio.timeout(240):
            while True:
                await self.api.until("Deployment", self.namespace, model, lambda one: one and not one["spec"].get("replicas"), within=120)
                for pod in await self.api.list("Pod", self.namespace, f"app={model}"):
                    await self.api.until("Pod", self.namespace, pod["metadata"]["name"], lambda one: one is None, within=120)
                found = await self.api.get("Deployment", self.namespace, model)
                if not found["spec"].get("replicas") and not await self.api.list("Pod", self.namespace, f"app={model}"):
                    return

    async def model(self, *options: str, **rules: Any) -> None:
        """The ModelSnapshot, captured, and its Deployment, which KEDA scales by `rules`."""
        await self.api.apply(snapshot(), deployment(), namespace=self.namespace)
        await self.api.until("ModelSnapshot", self.namespace, MODEL, is_ready, 120)
        await self.scaled(MODEL, **rules)

    async def scaled(self, model: str, **rules: Any) -> None:
        """A ScaledObject that KEDA has begun to follow."""
        await self.api.apply(scaled_object(self.namespace, model, **rules), namespace=self.namespace)
        await self.api.until("ScaledObject", self.namespace, model, lambda one: condition(one, "Ready"))


@asynccontextmanager
async def own_namespace(api: Api, stem: str, within: float = 300) -> AsyncIterator[str]:
    """Gone with the block; `within` so many seconds, or it is an error."""
    name = f"{stem}-{secrets.token_hex(3)}"
    await api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    try:
        yield name
    finally:
        await api.delete("Namespace", "", name)
        await api.until("Namespace", "", name, lambda one: one is None, within=within)


@asynccontextmanager
async def cordoned(made: Release, *names: str) -> AsyncIterator[None]:
    """No new pod is sent to these nodes."""
    if names:
        await made.run("kubectl", "cordon", *names)
    try:
        yield
    finally:
        if names:
            await made.run("kubectl", "uncordon", *names)


@asynccontextmanager
async def to_install(api: Api, kubeconfig: str, namespace: str) -> AsyncIterator[Release]:
    """Nothing of zerowake is in the cluster before and after; what is installed between is the caller's to say. Raises: Installed."""
    for one in await api.list("CustomResourceDefinition"):
        owner = one["metadata"].get("annotations", {}).get("meta.helm.sh/release-namespace")
        if one["metadata"]["name"] == CRD and owner:
            raise Installed(f"zerowake is installed in namespace {owner} of this cluster; uninstall it first")
        if one["metadata"]["name"] == CRD:
            await api.delete("CustomResourceDefinition", "", CRD)
            await api.until("CustomResourceDefinition", "", CRD, lambda found: found is None)
    made = Release(api, kubeconfig, namespace, "")
    try:
        yield made
    finally:
        for kind in ("ScaledObject", "Deployment"):
            for one in await api.list(kind, namespace):
                if one["metadata"]["name"] != "zerowake-scaler":
                    await api.delete(kind, namespace, one["metadata"]["name"])
                    await api.until(kind, namespace, one["metadata"]["name"], lambda found: found is None)
        await made.helm_uninstall("--ignore-not-found")


@asynccontextmanager
async def release(api: Api, kubeconfig: str, namespace: str) -> AsyncIterator[Release]:
    """Installed in the namespace, and gone again. Raises: Installed."""
    async with to_install(api, kubeconfig, namespace) as made:
        await made.helm_upgrade()
        await made.find_gateway()
        yield made


def is_ready(snapshot: Object | None) -> bool:
    return bool(snapshot) and ((snapshot or {}).get("status") or {}).get("phase") == "Ready"


def is_scaled(scaled: Object | None) -> bool:
    """Whether KEDA has looked at the ScaledObject."""
    return "Ready" in str((scaled or {}).get("status", {}).get("conditions"))


def snapshot(name: str = MODEL) -> Object:
    # One request at a time: a backlog is shared among replicas.
    spec = {"port": 8000, "canary": {"path": "/sum"}, "limits": {"concurrency": 1}, "template": {"spec": {"containers": [ENGINE]}}}
    return {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot", "metadata": {"name": name}, "spec": spec}


def deployment(name: str = MODEL, annotations: dict[str, str] | None = None, of: str = MODEL) -> Object:
    """`of`: the snapshot that its pods are restored from."""
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1}
    pod = {
        "metadata": {"labels": {"app": name, "zerowake.dev/snapshot": of}, "annotations": annotations or {}},
        # No volume, as in deploy/examples/engine.yaml. Python as a container's pid 1 does not hear SIGTERM.
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [{**ENGINE, "readinessProbe": probe}],
        },
    }
    spec = {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def scaled_object(namespace: str, model: str, target: int = 6, **rules: Any) -> Object:
    trigger = {"scalerAddress": f"zerowake-scaler.{namespace}.svc.cluster.local:9443", "model": model, "targetPending": str(target)}
    spec = {
        "scaleTargetRef": {"name": model},
        "pollingInterval": 1,
        "cooldownPeriod": 1,
        "maxReplicaCount": 1,
        "triggers": [{"type": "external-push", "metadata": trigger}],
        **rules,
    }
    return {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": model}, "spec": spec}
