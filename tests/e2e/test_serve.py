"""`zerowake serve` with the real KEDA: a backlog worth four replicas brings four at once, and KEDA and the HPA go on from there; without
KEDA there is one all the same; and a model's name in two namespaces scales one of them.

Two replicas of it run on this machine: requests come to one, KEDA speaks to the other. Pods are plain web servers, and no agent runs: where
nothing says that they are there, the requests stay held.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.e2e.api import Api, Object, condition
from tests.e2e.chart import definition
from tests.e2e.cluster.control import tell
from tests.e2e.cluster.layout import Addresses
from tests.e2e.release import own_namespace
from tests.e2e.test_keda import PORT, deployment, replicas_of, scaled_object

pytestmark = pytest.mark.own_cluster("has KEDA call a scaler on this machine")

NAME = "pause"
TIMES = 5
HPA_SYNC_SECONDS = 15


class Scaler:
    """Two replicas: `url` is the gateway of one, `keda` the other's address, and `other_url` its gateway."""

    def __init__(self, url: str, keda: str, client: aiohttp.ClientSession, other_url: str) -> None:
        self.other_url = other_url
        self.url = url
        self.keda = keda
        self._client = client

    def get(self) -> asyncio.Task[int]:
        async def asking() -> int:
            async with self._client.get(f"{self.url}/models/{NAME}/index.html") as response:
                return response.status

        return asyncio.create_task(asking())

    def ask(self, count: int) -> list[asyncio.Task[int]]:
        async def asking() -> int:
            async with self._client.post(f"{self.url}/v1/chat/completions", json={"model": NAME, "messages": []}) as response:
                return response.status

        return [asyncio.create_task(asking()) for _ in range(count)]


@asynccontextmanager
async def scaler(
    folder: Path, namespace: str, kubeconfig: str, machine: str, agents: Sequence[str] = ("127.0.0.1:1",)
) -> AsyncIterator[Scaler]:
    """`agents`: addresses of theirs; by default nobody listens there."""
    with ExitStack() as bound:
        sockets = [bound.enter_context(socket.socket()) for _ in range(8)]
        for each in sockets:
            each.bind((machine, 0))
        ports = [each.getsockname()[1] for each in sockets]
    replicas = [dict(zip(("listen", "metrics", "keda", "peers"), ports[start : start + 4], strict=True)) for start in (0, 4)]
    peers = [f"{machine}:{each['peers']}" for each in replicas]
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        for number, each in enumerate(replicas):
            config = {
                "namespace": namespace,
                "listen": f"{machine}:{each['listen']}",
                "metrics": f"{machine}:{each['metrics']}",
                "keda": {"listen": f"{machine}:{each['keda']}"},
                "peers": {"listen": f"{machine}:{each['peers']}", "addresses": peers},
                "agents": {"addresses": list(agents)},
                "drain_seconds": 0,
            }
            path = folder / f"{number}.yaml"
            path.write_text(yaml.safe_dump(config))
            await stack.enter_async_context(_running(path, {"KUBECONFIG": kubeconfig, "POD_NAME": f"replica-{number}"}))
        for each in replicas:
            async with asyncio.timeout(30):
                while not await _ready(client, f"http://{machine}:{each['metrics']}/readyz"):
                    await asyncio.sleep(0.1)
        urls = [f"http://{machine}:{each['listen']}" for each in replicas]
        yield Scaler(urls[0], f"{machine}:{replicas[1]['keda']}", client, urls[1])


@asynccontextmanager
async def _running(config: Path, environment: dict[str, str]) -> AsyncIterator[None]:
    program = (sys.executable, "-c", "from scaler.programs.commands import app; app()", "serve", str(config))
    process = await asyncio.create_subprocess_exec(*program, env=os.environ | environment)
    try:
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _ready(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url) as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def timeline(api: Api, namespace: str) -> AsyncIterator[tuple[float, int]]:
    """When the Deployment's number of replicas changed."""
    last = -1
    async for _, one in api.watch("Deployment", namespace):
        if (now := replicas_of(one)) != last:
            last = now
            yield time.monotonic(), now


async def test_a_backlog_brings_its_replicas_at_once(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path
) -> None:
    async with (
        definition(api, kubeconfig),  # a scaler is not ready before it has seen every ModelSnapshot
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        asyncio.timeout(240),
    ):
        await api.apply(deployment(NAME), scaled_object(NAME, zerowake.keda, most=10, target=8), namespace=namespace)
        await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
        first, four = [], []
        for run in range(TIMES):
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)
            await asyncio.sleep(3)  # KEDA opens a stream that ended after 2 s
            changes = timeline(api, namespace)
            assert (await anext(changes))[1] == 0
            began = time.monotonic()
            asked = zerowake.ask(32)
            seen = []
            async for at, replicas in changes:
                seen.append((round(1000 * (at - began)), replicas))
                if replicas == 1 and len(seen) == 1:
                    first.append(at - began)
                if replicas == 4:
                    four.append(at - began)
                    break
            print(f"run {run}: {seen} (ms, replicas)")
            if run == TIMES - 1:  # the HPA has looked, and finds what it would have set
                await api.until("HorizontalPodAutoscaler", namespace, f"keda-hpa-{NAME}", _has_looked, within=2 * HPA_SYNC_SECONDS + 5)
                assert replicas_of(await api.get("Deployment", namespace, NAME)) == 4
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        one, all_four = (1000 * statistics.median(each) for each in (first, four))
        print(f"first request → 1: {one:.0f} ms, → 4: {all_four:.0f} ms (medians of {TIMES}; the longest {1000 * max(four):.0f} ms)")
        assert max(four) < 1
        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)  # KEDA takes all of them away again


async def test_keda_is_gone_when_the_first_request_comes(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path
) -> None:
    async with (
        definition(api, kubeconfig),
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        asyncio.timeout(240),
    ):
        await api.apply(lease(), snapshot(), labelled(), scaled_object(NAME, zerowake.keda), namespace=namespace)
        await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
        await asyncio.to_thread(tell, "stop", "keda-operator")
        try:
            began = time.monotonic()
            asked = zerowake.get()
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 1, within=20)
            print(f"scaled without KEDA after {time.monotonic() - began:.2f} s")
            assert await asked == 200
            print(f"answered without KEDA after {time.monotonic() - began:.2f} s")
        finally:
            await asyncio.to_thread(tell, "start", "keda-operator")
            await gone(api, ("ModelSnapshot", namespace))
        assert "ScaledWithoutKeda" in {each["reason"] for each in await api.list("Event", namespace)}
        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0, within=120)  # it is KEDA's again


async def test_a_models_name_in_two_namespaces(api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path) -> None:
    async with (
        definition(api, kubeconfig),
        own_namespace(api, "other") as other,
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        asyncio.timeout(240),
    ):
        await api.apply(lease(), snapshot(), labelled(), scaled_object(NAME, zerowake.keda), namespace=namespace)
        await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
        await asyncio.sleep(1)  # ages are whole seconds: of two objects of one second either may count as the older
        await api.apply(labelled(), scaled_object(NAME, zerowake.keda), namespace=other)
        await api.until("ScaledObject", other, NAME, lambda one: condition(one, "Ready") and _activity(one))
        theirs: list[int] = []

        async def follow() -> None:
            async for _, replicas in timeline(api, other):
                theirs.append(replicas)

        following = asyncio.create_task(follow())
        try:
            assert await zerowake.get() == 200
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 1)
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)  # several polls later
            assert theirs == [0]
            async for _, event in api.watch("Event", other):
                if event["reason"] == "ModelNameTaken":
                    assert f"namespace {namespace}'s already" in event["message"]
                    break
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await gone(api, ("ScaledObject", other), ("ModelSnapshot", namespace))


async def gone(api: Api, *objects: tuple[str, str]) -> None:
    """While there is somebody who takes off their finalizers."""
    for kind, namespace in objects:
        await api.delete(kind, namespace, NAME)
        await api.until(kind, namespace, NAME, lambda one: one is None)


def labelled() -> Object:
    """A Deployment whose pods are a ModelSnapshot's."""
    made = deployment(NAME)
    made["spec"]["template"]["metadata"]["labels"]["zerowake.dev/snapshot"] = NAME
    return made


def snapshot() -> Object:
    """Of which nothing is captured, since no agent runs."""
    template = {"spec": deployment(NAME)["spec"]["template"]["spec"]}
    kind = {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot"}
    return {**kind, "metadata": {"name": NAME}, "spec": {"port": PORT, "template": template}}


def lease() -> Object:
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "zerowake-controller"}}


def _activity(one: Object | None) -> object:
    return ((one or {}).get("status") or {}).get("externalMetricNames")


def _has_looked(one: Object | None) -> bool:
    status = (one or {}).get("status") or {}
    return bool(status.get("currentReplicas") == 4 and status.get("desiredReplicas") == 4 and condition(one, "ScalingActive"))
