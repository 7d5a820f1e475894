"""KEDA's side alone: a request that is held at the gateway makes the real KEDA scale a Deployment from zero, and back.

Gateway and external scaler run in this test; KEDA, the API server, the kubelet and the pod are real. The pod is a plain web server: nothing
is restored here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.trigger import Trigger
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint
from scaler.gateway.gateway import Gateway
from scaler.keda.external_scaler import serve_external_scaler
from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.layout import PAUSE_IMAGE, Addresses

pytestmark = pytest.mark.own_cluster("has KEDA call a scaler on this machine")

METRIC = "s0-zerowake-pending"
COOLDOWN_SECONDS = 2
POLL_SECONDS = 1
PORT = 8000


def deployment(name: str) -> Object:
    """A server that answers any path with its host's name once it has its port."""
    container = {
        "name": "engine",
        "image": PAUSE_IMAGE,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", f"hostname >/tmp/index.html; exec httpd -f -p {PORT} -h /tmp"],
        "readinessProbe": {"httpGet": {"path": "/", "port": PORT}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "8Mi"}},
    }
    pod = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 1}}
    spec = {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def scaled_object(name: str, scaler: str, *, most: int = 3, target: float = 1) -> Object:
    metadata = {"scalerAddress": scaler, "model": name, "targetPending": str(target)}
    spec = {
        "scaleTargetRef": {"name": name},
        "pollingInterval": POLL_SECONDS,
        "cooldownPeriod": COOLDOWN_SECONDS,
        "minReplicaCount": 0,
        "maxReplicaCount": most,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}}},
        "triggers": [{"type": "external-push", "metadata": metadata}],
    }
    return {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": name}, "spec": spec}


class Front:
    """A gateway and an external scaler for one model, as `zerowake serve` joins them; replicas are this test's to announce."""

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher, url: str, scaler: str, client: aiohttp.ClientSession) -> None:
        self.ledger = ledger
        self.dispatcher = dispatcher
        self.scaler = scaler
        self.known = asyncio.Event()  # KEDA has opened its stream
        self._url = url
        self._client = client

    def ask(self, model: str) -> asyncio.Task[str]:
        async def answer() -> str:
            async with self._client.get(f"{self._url}/models/{model}/index.html") as response:
                text = await response.text()
                assert response.status == 200, text
                return text.strip()

        return asyncio.create_task(answer())


@asynccontextmanager
async def front(model: str, addresses: Addresses) -> AsyncIterator[Front]:
    ledger = Ledger({model: ModelLimits(concurrency=1)})
    dispatcher = Dispatcher(ledger)
    known = asyncio.Event()

    def opened(trigger: Trigger) -> None:
        known.set()

    gateway = Gateway(ledger, dispatcher)
    async with (
        serve_external_scaler(ledger, address=f"{addresses.machine}:0", activations=ledger.activations, on_trigger=opened) as scaler,
        gateway.serve("127.0.0.1", 0) as (host, port),
        aiohttp.ClientSession() as client,
    ):
        one = Front(ledger, dispatcher, f"http://{host}:{port}", scaler, client)
        one.known = known
        try:
            yield one
        finally:
            await dispatcher.close()


def replicas_of(one: Object | None) -> int:
    return int((one or {}).get("spec", {}).get("replicas", -1))


async def ready_pod(api: Api, namespace: str, name: str) -> Object:
    async for _, pod in api.watch("Pod", namespace, f"app={name}"):
        if condition(pod, "Ready"):
            return pod
    raise AssertionError("unreachable: a watch has no end")


async def test_from_zero_and_back(api: Api, namespace: str, addresses: Addresses) -> None:
    name = "pause"
    async with front(name, addresses) as zerowake, asyncio.timeout(120):
        await api.apply(deployment(name), scaled_object(name, zerowake.scaler), namespace=namespace)
        await zerowake.known.wait()
        await api.until("ScaledObject", namespace, name, lambda one: condition(one, "Ready"))
        assert replicas_of(await api.get("Deployment", namespace, name)) == 0

        began = time.monotonic()
        answer = zerowake.ask(name)
        scaled = asyncio.create_task(api.until("Deployment", namespace, name, lambda one: replicas_of(one) == 1))
        pod = await ready_pod(api, namespace, name)
        ready_seconds = time.monotonic() - began
        assert scaled.done(), "the pod is there before its Deployment was scaled"
        zerowake.dispatcher.add(Backend(pod["metadata"]["uid"], name, Endpoint(pod["status"]["podIP"], PORT)))
        assert await answer == pod["metadata"]["name"]
        print(f"first request → pod Ready: {ready_seconds:.3f} s")

        zerowake.dispatcher.remove(pod["metadata"]["uid"])
        await api.until("Deployment", namespace, name, lambda one: replicas_of(one) == 0)
        await api.until("Pod", namespace, pod["metadata"]["name"], lambda one: one is None)


async def test_the_autoscaler_reads_our_number(api: Api, namespace: str, addresses: Addresses) -> None:
    """What `kubectl get --raw` shows is the number of requests that are pending, and the autoscaler acts on it."""
    name = "pause"
    async with front(name, addresses) as zerowake, asyncio.timeout(120):
        await api.apply(deployment(name), scaled_object(name, zerowake.scaler, most=3), namespace=namespace)
        await zerowake.known.wait()
        answers = [zerowake.ask(name) for _ in range(3)]
        await api.until("Deployment", namespace, name, lambda one: replicas_of(one) >= 1)
        where = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{METRIC}"
        selector = {"labelSelector": f"scaledobject.keda.sh/name={name}"}
        (item,) = (await api.ask("GET", where, selector))["items"]
        assert (item["metricName"], item["value"]) == (METRIC, "3")

        await api.until("Deployment", namespace, name, lambda one: replicas_of(one) == 3)
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        await api.until("Deployment", namespace, name, lambda one: replicas_of(one) == 0)
