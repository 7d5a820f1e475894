"""Requests that are held while parts of the cluster go: each is answered, or refused in a way that says to ask again; no pod is stranded.

The engine's pods have a scheduling gate, which the test takes off: so a request is held as long as the test likes, and what goes does so
either while the pod waits for a node, or while it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from kubernetes.aio.client.exceptions import ApiException

from tests.e2e.api import Api, ApiError, Object, path
from tests.e2e.chart import CHART
from tests.e2e.cluster.control import enter, tell
from tests.e2e.release import MODEL, Release, deployment, is_ready, is_scaled, own_namespace, release, scaled_object, snapshot

pytestmark = [
    pytest.mark.own_cluster("restarts parts of the cluster"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
GATE = "zerowake.dev/tests"
REQUESTS = 4
PARTED_SECONDS = 12.0
PATIENCE_SECONDS = 150.0  # Kubernetes' own controllers may look again a minute after the API server is back
AWAY = (ApiError, ApiException, aiohttp.ClientError, OSError)  # the API server is restarting


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None) -> AsyncIterator[Release]:
    """Two replicas of the scaler, an agent on each node, and a captured model."""
    gated = deployment()
    gated["spec"]["template"]["spec"]["schedulingGates"] = [{"name": GATE}]
    async with Api.connect(kubeconfig) as api, own_namespace(api, "held") as namespace, release(api, kubeconfig, namespace) as made:
        await api.apply(snapshot(), gated, namespace=namespace)
        await api.until("ModelSnapshot", namespace, MODEL, is_ready, 120)
        await api.apply(scaled_object(namespace, MODEL), namespace=namespace)
        await api.until("ScaledObject", namespace, MODEL, is_scaled)
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS)) as session:
        yield session


async def keda(_: Release) -> None:
    await asyncio.to_thread(tell, "restart", "keda-operator")


async def api_server(_: Release) -> None:
    await asyncio.to_thread(tell, "restart", "kube-apiserver")


async def kubelet(installed: Release) -> None:
    """Of the node that has the snapshot, to which the pod is sent."""
    (node,) = await installed.holders()
    await asyncio.to_thread(tell, "restart", "kubelet", node)


async def container_runtime(installed: Release) -> None:
    """Of the same node. The agent there is its NRI plugin, which it has to be once more."""
    (node,) = await installed.holders()
    await asyncio.to_thread(tell, "restart", "containerd", node)


async def parted(installed: Release) -> None:
    """The two replicas of the scaler do not reach each other, for longer than they take to notice it."""
    one, other = [(pod["spec"]["nodeName"], pod["status"]["podIP"]) for pod in await installed.pods("zerowake-scaler")]

    def rule(verb: str) -> None:
        for (node, address), (_, away) in ((one, other), (other, one)):
            drop = ["iptables", verb, "FORWARD", "--source", address, "--destination", away, "--jump", "DROP"]
            subprocess.run([*enter(node), *drop], check=True)

    await asyncio.to_thread(rule, "--insert")
    try:
        await asyncio.sleep(PARTED_SECONDS)
    finally:
        await asyncio.to_thread(rule, "--delete")


async def rolled(installed: Release, *command: str) -> None:
    """Until one of the two that hold the requests is going; the other one follows while they are answered, and the agents meanwhile."""
    before = {pod["metadata"]["name"] for pod in await installed.pods("zerowake-scaler")}
    await installed.run(*command, "-n", installed.namespace)
    async with asyncio.timeout(60):
        async for _, pod in installed.api.watch("Pod", installed.namespace, "app.kubernetes.io/name=zerowake-scaler"):
            if pod["metadata"]["name"] in before and pod["metadata"].get("deletionTimestamp"):
                return


async def upgraded(installed: Release) -> None:
    """The chart, with another value of the scaler's and one of the agents': both roll at once."""
    new = "scaler.drainSeconds=29,agent.orphanGraceSeconds=599"
    await rolled(installed, "helm", "upgrade", "zerowake", str(CHART), "--reset-then-reuse-values", f"--set={new}")


async def rolled_back(installed: Release) -> None:
    """To how it was before the upgrade."""
    await rolled(installed, "helm", "rollback", "zerowake")


async def agent(installed: Release) -> None:
    """The one that has the snapshot: killed at once, with all it was doing."""
    (pod,) = await installed.agents(*await installed.holders())
    await installed.api.delete("Pod", installed.namespace, pod["metadata"]["name"], grace_seconds=0)


async def evicted(installed: Release) -> None:
    (pod,) = [one for one in await installed.api.list("Pod", installed.namespace, f"app={MODEL}") if not leaves(one)]
    name = pod["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": installed.namespace}}
    await installed.api.ask("POST", path("Pod", installed.namespace, name, "eviction"), None, eviction)


@pytest.mark.parametrize(
    ("goes", "moment"),
    [
        *itertools.product((keda, api_server, kubelet, container_runtime, parted, agent, evicted), ("waiting", "starting")),
        (upgraded, "waiting"),
        (rolled_back, "starting"),
    ],
)
async def test_held_requests(
    installed: Release, client: aiohttp.ClientSession, goes: Callable[[Release], Awaitable[None]], moment: str
) -> None:
    began = time.monotonic()
    async with gates(installed) as opened:
        requests = [asyncio.create_task(ask(installed, client)) for _ in range(REQUESTS)]
        await one_pod(installed, lambda pod: bool(pod["spec"].get("schedulingGates")))
        if moment == "starting":
            opened.set()
            await one_pod(installed, lambda pod: bool(pod["spec"].get("nodeName")))
        await goes(installed)
        opened.set()
        answers = await asyncio.gather(*requests)
        print(f"{goes.__name__}, {moment}: {answers} after {time.monotonic() - began:.1f} s")
        statuses = {status for status, _ in answers}
        assert statuses <= {200, 429, 502, 503}, answers
        assert all(retry for status, retry in answers if status != 200), f"refused without a word when to ask again: {answers}"
        if goes not in (upgraded, rolled_back):  # whose replicas answer what they hold for half a minute, and refuse the rest
            assert statuses == {200}, answers
        # Nothing stays behind, and all works as before.
        await at_zero(installed)
        assert await ask(installed, client) == (200, ""), "a new request, when all is over"
        await at_zero(installed)
    await installed.run("kubectl", "-n", installed.namespace, "rollout", "status", "deployment/zerowake-scaler", "--timeout=2m")
    await installed.run("kubectl", "-n", installed.namespace, "rollout", "status", "daemonset/zerowake-agent", "--timeout=2m")


async def ask(installed: Release, client: aiohttp.ClientSession) -> tuple[int, str]:
    """Status, and after how long a refused one is told to ask again. A connection that ends without an answer raises."""
    async with client.get(f"{installed.url}/models/{MODEL}/sum") as response:
        text = await response.text()
        assert response.status != 200 or "digest" in text
        return response.status, response.headers.get("Retry-After", "")


@contextlib.asynccontextmanager
async def gates(installed: Release) -> AsyncIterator[asyncio.Event]:
    """Once it is set, the engine's pods get past their gate as they come."""
    opened = asyncio.Event()

    async def follow() -> None:
        await opened.wait()
        while True:
            with contextlib.suppress(*AWAY):
                async for _, pod in installed.api.watch("Pod", installed.namespace, f"app={MODEL}"):
                    if pod["spec"].get("schedulingGates") and not leaves(pod):
                        await installed.api.merge("Pod", installed.namespace, pod["metadata"]["name"], {"spec": {"schedulingGates": None}})
            await asyncio.sleep(0.2)

    task = asyncio.create_task(follow())
    try:
        yield opened
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def one_pod(installed: Release, holds: Callable[[Object], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for _, pod in installed.api.watch("Pod", installed.namespace, f"app={MODEL}"):
            if holds(pod) and not leaves(pod):
                return


async def at_zero(installed: Release) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            with contextlib.suppress(*AWAY):
                await installed.at_zero()
                return
            await asyncio.sleep(0.2)


def leaves(pod: Object) -> Any:
    return pod["metadata"].get("deletionTimestamp")
