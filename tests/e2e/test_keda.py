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
from tests.e2e.cluster.layout import Addresses
from tests.e2e.plain_model import NAME, PORT, deployment, replicas_of, scaled_object

pytestmark = pytest.mark.own_cluster("has KEDA call a scaler on this machine")

METRIC = "s0-zerowake-pending"


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


async def ready_pod(api: Api, namespace: str, name: str) -> Object:
    async for _, pod in api.watch("Pod", namespace, f"app={name}"):
        if condition(pod, "Ready"):
            return pod
    raise AssertionError("unreachable: a watch has no end")


async def test_from_zero_and_back(api: Api, namespace: str, addresses: Addresses) -> None:
    async with front(NAME, addresses) as zerowake, asyncio.timeout(120):
        await api.apply(deployment(NAME), scaled_object(NAME, zerowake.scaler), namespace=namespace)
        await zerowake.known.wait()
        await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready"))
        assert replicas_of(await api.get("Deployment", namespace, NAME)) == 0

        began = time.monotonic()
        answer = zerowake.ask(NAME)
        scaled = asyncio.create_task(api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 1))
        pod = await ready_pod(api, namespace, NAME)
        ready_seconds = time.monotonic() - began
        assert scaled.done(), "the pod is there before its Deployment was scaled"
        zerowake.dispatcher.add(Backend(pod["metadata"]["uid"], NAME, Endpoint(pod["status"]["podIP"], PORT)))
        assert await answer == pod["metadata"]["name"]
        print(f"first request → pod Ready: {ready_seconds:.3f} s")

        zerowake.dispatcher.remove(pod["metadata"]["uid"])
        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)
        await api.until("Pod", namespace, pod["metadata"]["name"], lambda one: one is None)


async def test_the_autoscaler_reads_our_number(api: Api, namespace: str, addresses: Addresses) -> None:
    """What `kubectl get --raw` shows is the number of requests that are pending, and the autoscaler acts on it."""
    async with front(NAME, addresses) as zerowake, asyncio.timeout(120):
        await api.apply(deployment(NAME), scaled_object(NAME, zerowake.scaler, most=3), namespace=namespace)
        await zerowake.known.wait()
        answers = [zerowake.ask(NAME) for _ in range(3)]
        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) >= 1)
        where = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{METRIC}"
        selector = {"labelSelector": f"scaledobject.keda.sh/name={NAME}"}
        (item,) = (await api.ask("GET", where, selector))["items"]
        assert (item["metricName"], item["value"]) == (METRIC, "3")

        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 3)
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)
