"""Pods that stay though nobody asks: their engines sleep, Kubernetes takes them for well, and the next request wakes them in place.

A threaded engine on the CPU, in a pod of a real kubelet that looks every second whether it lives and is ready, kept by KEDA
(`minReplicaCount: 1`); an agent of this checkout on the node, and two gateways on this machine.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.api import Api, Object, condition
from tests.e2e.chart import definition
from tests.e2e.cluster.layout import Addresses
from tests.e2e.node_agent import IMAGE, PORT, Agent
from tests.e2e.plain_model import scaled_object
from tests.e2e.release import is_ready
from tests.e2e.serving import scaler

pytestmark = pytest.mark.own_cluster("runs an agent of its own on the node, and gateways on this machine")
DOZING = (Path(__file__).parents[1] / "worlds/dozing_engine.py").read_text()
COMMAND = ["python3", "-u", "-c", DOZING, str(PORT), "16"]
ROUNDS = 5
PROBED_SECONDS = 15.0  # of a liveness probe that begins after ten and gives up after two
WITHIN = 60.0


@asynccontextmanager
async def reached(agent: Agent) -> AsyncIterator[str]:
    """An address of the agent's for gateways, whose configuration names no sockets of a machine's own."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_agent = await asyncio.open_unix_connection(agent.state / "agent.sock")
        await asyncio.gather(_copy(reader, to_agent[1]), _copy(to_agent[0], writer), return_exceptions=True)

    async with await asyncio.start_server(pass_on, "127.0.0.1") as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()


@asynccontextmanager
async def removed(api: Api, namespace: str, name: str) -> AsyncIterator[None]:
    """Its ModelSnapshot goes while there is a controller to let it go."""
    try:
        yield
    finally:
        await api.delete("ModelSnapshot", namespace, name)
        await api.until("ModelSnapshot", namespace, name, lambda one: one is None, WITHIN)


def engine() -> Object:
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1, "failureThreshold": 2}
    return {
        "name": "engine",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": COMMAND,
        "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": probe,
        # It must not end what is being restored still.
        "livenessProbe": {**probe, "initialDelaySeconds": 10, "httpGet": {"path": "/alive?deep=1", "port": PORT}},
    }


def objects(name: str, node: str, keda: str) -> list[Object]:
    """Its pods as the webhook leaves them, on the agent's node. The rung on which they sleep is their model's name."""
    spec = {
        "nodeSelector": {"kubernetes.io/hostname": node},
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "containers": [engine()],
    }
    of_model = {"port": PORT, "canary": {"path": "/sum"}, "template": {"spec": spec}, "idle": name, "idleSeconds": 2}
    told = {f"zerowake.dev/{key}": value for key, value in {"container": "engine", "port": str(PORT), "model": name}.items()}
    pod = {"metadata": {"labels": {"app": name, "zerowake.dev/snapshot": name}, "annotations": told}, "spec": spec}
    kept = scaled_object(name, keda, most=1, target=8)
    return [
        {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot", "metadata": {"name": name}, "spec": of_model},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": pod},
        },
        {**kept, "spec": {**kept["spec"], "minReplicaCount": 1}},
    ]


async def asked(url: str, path: str = "/sum") -> str:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WITHIN)) as client, client.get(f"{url}{path}") as answer:
        text = await answer.text()
        assert answer.status == 200, f"{path}: {answer.status}: {text}"
        return text


async def sleeping(api: Api, namespace: str, name: str, count: int) -> None:
    await api.until("ModelSnapshot", namespace, name, lambda one: one and one["status"].get("asleep", 0) == count, WITHIN)


async def pod_of(api: Api, namespace: str, name: str) -> Object:
    (pod,) = await api.list("Pod", namespace, f"app={name}")
    return pod


def engine_of(pod: Object) -> tuple[str, int]:
    """Its container, and how often the kubelet has started it anew."""
    (status,) = pod["status"]["containerStatuses"]
    return status["containerID"], status["restartCount"]


async def told(api: Api, namespace: str, pod: str, *reasons: str) -> set[str]:
    """Reasons of all events of a pod, once these are among them."""
    async with asyncio.timeout(WITHIN):
        while True:
            found = {each["reason"] for each in await api.list("Event", namespace) if each["involvedObject"]["name"] == pod}
            if set(reasons) <= found:
                return found
            await asyncio.sleep(0.2)  # events are many: they are listed


async def woken(api: Api, namespace: str, name: str, gateways: Sequence[str], before: str) -> list[float]:
    """Seconds from a request to its answer, which is the one from before."""
    seconds = []
    for number in range(ROUNDS):
        await sleeping(api, namespace, name, 1)
        begin = time.monotonic()
        assert await asked(gateways[number % 2]) == before
        seconds.append(time.monotonic() - begin)
        await sleeping(api, namespace, name, 0)
    return seconds


@pytest.mark.parametrize("idle", ["parked", "standby"])
async def test_a_pod_that_stays_sleeps_and_is_woken_in_place(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path, running: Agent, idle: str
) -> None:
    async with (
        definition(api, kubeconfig),
        reached(running) as address,
        scaler(tmp_path, namespace, kubeconfig, addresses.machine, [address]) as zerowake,
        removed(api, namespace, idle),
        asyncio.timeout(150),
    ):
        gateways = [f"{url}/models/{idle}" for url in (zerowake.url, zerowake.other_url)]
        snapshot, *workload = objects(idle, running.node, zerowake.keda)
        await api.apply(snapshot, namespace=namespace)
        await api.until("ModelSnapshot", namespace, idle, is_ready, 120)
        await api.apply(*workload, namespace=namespace)
        before = await asked(gateways[0])
        await sleeping(api, namespace, idle, 1)
        pod = await pod_of(api, namespace, idle)
        name, kept = pod["metadata"]["name"], engine_of(pod)
        await asyncio.sleep(PROBED_SECONDS)  # for the kubelet to find out what it can
        pod = await api.get("Pod", namespace, name)
        assert condition(pod, "Ready") and engine_of(pod) == kept, pod["status"]
        seconds = await woken(api, namespace, idle, gateways, before)
        print(f"{idle}: woken and answered in {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")
        await sleeping(api, namespace, idle, 1)
        assert (await asked(gateways[1], "/stream?seconds=5")).count("word") == 50, "what takes longer than it is left awake is use"
        await sleeping(api, namespace, idle, 1)
        assert await asked(f"http://{pod['status']['podIP']}:{PORT}") == before, "past the gateways, as through a Service"
        assert engine_of(await pod_of(api, namespace, idle)) == kept, "the same container all the while"
        reasons = await told(api, namespace, name, "Restored", "Slept", "Woken")
        assert not {"StaysAwake", "WakeFailed", "ColdStarted"} & reasons, reasons
