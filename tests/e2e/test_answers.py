"""Answers that have begun, while what stands around them goes: each is whole, event by event.

Streams of twenty seconds go through the gateway to a threaded engine, in a restored pod and in one that was started cold, and meanwhile the
agent is killed or upgraded, the scaler is rolled, and the pods are scaled in, evicted or drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.api import Api, Object, condition, path
from tests.e2e.release import ENGINE, Release, is_ready, own_namespace, release
from tests.e2e.restored_pods import emptied, pods_of, ready_pod, restores, scaled, was_restored

pytestmark = [
    pytest.mark.own_cluster("kills agents, and drains nodes"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
SERVER = (Path(__file__).parents[1] / "worlds/streaming_engine.py").read_text()
RESTORED, COLD = "restored", "cold"
EVENTS, EVERY_SECONDS = 80, 0.25
GRACE_SECONDS = 60
_BEGIN_SECONDS = 30.0
# It is in the agent's container, which sees the node's processes: of those the container's own.
KILL = """
import os, pathlib
own = pathlib.Path('/proc/self/cgroup').read_text()
for found in pathlib.Path('/proc').glob('[0-9]*'):
    try:
        if int(found.name) != os.getpid() and b'--kubernetes' in (found / 'cmdline').read_bytes() and (found / 'cgroup').read_text() == own:
            os.kill(int(found.name), 9)
    except OSError:
        pass
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None) -> AsyncIterator[Release]:
    """Two replicas of the scaler, an agent on each node, and two models: one whose pods are restored, one whose pods opted out."""
    async with Api.connect(kubeconfig) as api, own_namespace(api, "answers") as namespace, release(api, kubeconfig, namespace) as made:
        for name in (RESTORED, COLD):
            await api.apply(snapshot(name), deployment(name), namespace=namespace)
        for name in (RESTORED, COLD):
            await api.until("ModelSnapshot", namespace, name, is_ready, 150)
        yield made


def snapshot(name: str) -> Object:
    spec = {"port": 8000, "canary": {"path": "/"}, "limits": {"concurrency": 4}, "template": {"spec": {"containers": [engine()]}}}
    return {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot", "metadata": {"name": name}, "spec": spec}


def engine() -> Object:
    command: Object = {"command": ["python3", "-u", "-c", SERVER, "8000"]}
    return {key: value for key, value in ENGINE.items() if key != "args"} | command


def deployment(name: str) -> Object:
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1}
    pod = {
        "metadata": {
            "labels": {"app": name, "zerowake.dev/snapshot": name},
            "annotations": {"zerowake.dev/restore": "false"} if name == COLD else {},
        },
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "containers": [{**engine(), "readinessProbe": probe}],
        },
    }
    spec = {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


async def serving(made: Release) -> Object:
    """One pod of each model, made for this test; the one that is returned was restored.

    Those of earlier tests may be of any kind: while the node that has the snapshot is drained, the next one starts cold on another.
    """
    await emptied(made, RESTORED, COLD)
    await restores(made, RESTORED)
    await scaled(made, 1, RESTORED, COLD)
    pod, _ = await asyncio.gather(ready_pod(made, RESTORED), ready_pod(made, COLD))
    return await was_restored(made, pod)


class Stream:
    """One answer, read as it comes."""

    def __init__(self, made: Release, client: aiohttp.ClientSession, model: str, events: int = EVENTS) -> None:
        self.began = asyncio.Event()
        self.expected = events
        self.numbers: list[int] = []
        self.task = asyncio.create_task(self._read(f"{made.url}/models/{model}/stream?n={events}&every={EVERY_SECONDS}", client))

    async def _read(self, url: str, client: aiohttp.ClientSession) -> None:
        async with client.get(url) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: "):
                    self.numbers.append(int(line[6:]))
                    self.began.set()

    async def begun(self) -> None:
        """Its first event has come. Raises what it has ended by, where it has ended before."""
        first = asyncio.create_task(self.began.wait())
        await asyncio.wait({first, self.task}, timeout=_BEGIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if not self.began.is_set():
            assert self.task.done(), f"no event within {_BEGIN_SECONDS:g} s"
            await self.task
        assert self.began.is_set()

    async def whole(self) -> None:
        await self.task
        assert self.numbers == list(range(self.expected))


# What goes.


async def agent_killed(made: Release) -> None:
    """On every node where an engine answers."""
    await asyncio.gather(*(killed(made, agent) for agent in await made.agents(*await nodes(made))))


async def nodes(made: Release) -> set[str]:
    """Where the engines' pods are."""
    return {pod["spec"]["nodeName"] for model in (RESTORED, COLD) for pod in await pods_of(made, model)}


async def killed(made: Release, pod: Object) -> None:
    name = pod["metadata"]["name"]
    with contextlib.suppress(AssertionError):  # it ends with the container
        await made.run("kubectl", "-n", made.namespace, "exec", name, "-c", "agent", "--", "python", "-c", KILL)
    await made.api.until(
        "Pod",
        made.namespace,
        name,
        lambda one: one and condition(one, "Ready") and one["status"]["containerStatuses"][0]["restartCount"] > restarts(pod),
        90,
    )


def restarts(pod: Object) -> int:
    found: int = pod["status"]["containerStatuses"][0]["restartCount"]
    return found


async def agent_upgraded(made: Release) -> None:
    await made.run("kubectl", "-n", made.namespace, "rollout", "restart", "daemonset/zerowake-agent")
    await made.run("kubectl", "-n", made.namespace, "rollout", "status", "daemonset/zerowake-agent", "--timeout=90s")


async def scaler_rolled(made: Release) -> None:
    await made.run("kubectl", "-n", made.namespace, "rollout", "restart", "deployment/zerowake-scaler")
    await made.run("kubectl", "-n", made.namespace, "rollout", "status", "deployment/zerowake-scaler", "--timeout=90s")


async def scaled_in(made: Release) -> None:
    """As KEDA and the HPA do it: which of the pods go, the ReplicaSet's controller says."""
    await scaled(made, 0, RESTORED, COLD)


async def evicted(made: Release) -> None:
    for model in (RESTORED, COLD):
        for pod in await pods_of(made, model):
            name = pod["metadata"]["name"]
            eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": made.namespace}}
            await made.api.ask("POST", path("Pod", made.namespace, name, "eviction"), None, eviction)


async def drained(made: Release) -> None:
    """Of the models' pods, each node that has one: what else is there is not looked at here."""
    names = await nodes(made)
    try:
        options = ("--ignore-daemonsets", "--delete-emptydir-data", f"--pod-selector=app in ({RESTORED},{COLD})", "--timeout=100s")
        # Each by a command of its own: one command drains them one after the other.
        await asyncio.gather(*(made.run("kubectl", "drain", name, *options) for name in names))
    finally:
        await made.run("kubectl", "uncordon", *names)


@pytest.mark.parametrize("goes", [agent_killed, agent_upgraded, scaler_rolled, scaled_in, evicted, drained])
async def test_streams_are_whole(installed: Release, goes: Callable[[Release], Awaitable[None]]) -> None:
    await serving(installed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as client:
        streams = [Stream(installed, client, model) for model in (RESTORED, COLD, RESTORED)]
        await asyncio.gather(*(stream.begun() for stream in streams))
        began = time.monotonic()
        await asyncio.gather(goes(installed), *(stream.whole() for stream in streams))
        print(f"{goes.__name__}: three streams are whole, {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("goes", [agent_killed, agent_upgraded])
async def test_a_request_without_a_first_byte_is_executed_once(installed: Release, goes: Callable[[Release], Awaitable[None]]) -> None:
    await serving(installed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as client:
        before = [await said(installed, client, model, "/count") for model in (RESTORED, COLD)]
        asked = [asyncio.create_task(said(installed, client, model, "/slow?seconds=10")) for model in (RESTORED, COLD)]
        await asyncio.gather(goes(installed), *asked)
        after = [await said(installed, client, model, "/count") for model in (RESTORED, COLD)]
        assert [int(now) - int(then) for then, now in zip(before, after, strict=True)] == [1, 1]


async def said(made: Release, client: aiohttp.ClientSession, model: str, where: str) -> str:
    async with client.get(f"{made.url}/models/{model}{where}") as response:
        assert response.status == 200, await response.text()
        return await response.text()


async def test_an_idle_restored_pod_goes_at_once(installed: Release) -> None:
    pod = await serving(installed)
    async with aiohttp.ClientSession() as client:
        await said(installed, client, RESTORED, "/")  # the gateway keeps the connection for the next one
    began = time.monotonic()
    await scaled(installed, 0, RESTORED, COLD)
    await installed.api.until("Pod", installed.namespace, pod["metadata"]["name"], lambda one: one is None, within=GRACE_SECONDS / 3)
    print(f"an idle restored pod is gone after {time.monotonic() - began:.2f} s")
