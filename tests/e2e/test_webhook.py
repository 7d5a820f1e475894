"""The admission webhook as the real API server asks it: over its Service, with its CA bundle, for labelled pods only."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.kubernetes.pod_patch import NodeSetup
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, REPORTER, ModelSnapshot
from scaler.kubernetes.webhook import PODS, SECONDS, serve_webhook
from tests.e2e.api import Api, Object, path
from tests.e2e.chart import definition, render
from tests.e2e.cluster.layout import PAUSE_IMAGE, Addresses
from tests.worlds.certificates import Authority
from tests.worlds.fake_agent import Agent
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.tls import TlsFiles

pytestmark = pytest.mark.own_cluster("has the API server call a webhook on this machine")

DIGEST = "ab" * 32
ENGINE = {"name": "engine", "image": PAUSE_IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", "sleep 1000"], "args": ["$(HOME)"]}


def pod(name: str, *, labels: dict[str, str] | None = None, annotations: dict[str, str] | None = None, **engine: Any) -> Object:
    metadata = {"name": name, "labels": {"zerowake.dev/snapshot": "chat"} if labels is None else labels, "annotations": annotations or {}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [ENGINE | engine]}}


@dataclass
class World:
    api: Api
    namespace: str
    agent: Agent
    folder: Path
    serving: contextlib.AsyncExitStack
    hook: Object  # the MutatingWebhookConfiguration

    async def create(self, one: Object) -> Object:
        """As the API server would store it."""
        return await self.api.ask("POST", path("Pod", self.namespace), {"dryRun": "All"}, one)

    async def restored(self, one: Object) -> bool:
        made = await self.create(one)
        return "zerowake.dev/digest" in made["metadata"].get("annotations", {})


@pytest.fixture
async def world(
    api: Api, namespace: str, kubeconfig: str, addresses: Addresses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    authority = Authority("zerowake test authority")
    certificate, key = authority.issue(f"zerowake-webhook.{namespace}.svc").write(tmp_path, "tls")
    (hook,) = [one for one in render(kubeconfig, namespace) if one["kind"] == "MutatingWebhookConfiguration"]
    hook["metadata"] = {"name": f"zerowake-{namespace}"}
    for each in hook["webhooks"]:
        each["clientConfig"]["caBundle"] = base64.b64encode(authority.certificate).decode()
        each["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}  # others' tests are not ours
    async with contextlib.AsyncExitStack() as stack, contextlib.AsyncExitStack() as serving:
        await stack.enter_async_context(definition(api, kubeconfig))
        cluster = await stack.enter_async_context(Cluster.connect(reporter=REPORTER, instance="test"))
        nodes, agent = Nodes(Readiness(Dispatcher(Ledger())), Activations()), Agent((await api.list("Node"))[0]["metadata"]["name"])
        await stack.enter_async_context(nodes.follow(await stack.enter_async_context(agent.serve())))
        agent.has(namespace, "chat", DIGEST, rung=agent_pb2.RUNG_MEMORY)
        made = {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot", "metadata": {"name": "chat"}}
        await api.apply({**made, "spec": {"artifact": {"name": "chat", "digest": DIGEST}}}, namespace=namespace)
        condition = {"type": "Ready", "status": "True", "reason": "Resident", "lastTransitionTime": "2026-11-22T06:00:00Z"}
        await api.merge("ModelSnapshot", namespace, "chat", {"status": {"digest": DIGEST, "conditions": [condition]}}, "status")
        snapshots = await stack.enter_async_context(cluster.follow(MODEL_SNAPSHOTS, ModelSnapshot))
        async with asyncio.timeout(10):
            await snapshots.synced.wait()
        listening = serve_webhook("0.0.0.0", 0, TlsFiles(certificate, key), snapshots=snapshots, nodes=nodes, setup=NodeSetup())
        _, port = await serving.enter_async_context(listening)
        service = {
            "kind": "Service",
            "apiVersion": "v1",
            "metadata": {"name": "zerowake-webhook"},
            "spec": {"ports": [{"name": "https", "port": 443}]},
        }
        endpoints = {
            "kind": "EndpointSlice",
            "apiVersion": "discovery.k8s.io/v1",
            "metadata": {"name": "zerowake-webhook", "labels": {"kubernetes.io/service-name": "zerowake-webhook"}},
            "addressType": "IPv4",
            "ports": [{"name": "https", "port": port}],
            "endpoints": [{"addresses": [addresses.machine]}],
        }
        await api.apply(service, endpoints, namespace=namespace)
        await api.apply(hook)
        stack.push_async_callback(api.delete, "MutatingWebhookConfiguration", "", f"zerowake-{namespace}")
        world = World(api, namespace, agent, tmp_path, serving, hook)
        async with asyncio.timeout(30):  # kube-proxy and the API server have to hear of it
            while not await world.restored(pod("probe")):
                await asyncio.sleep(0.2)
        yield world


async def test_a_labelled_pod_is_changed_and_nothing_else(world: World) -> None:
    made = await world.create(pod("chat-1"))
    engine = made["spec"]["containers"][0]
    assert engine["command"] == ENGINE["command"] and engine["args"] == ENGINE["args"], "as its owner wrote it"
    assert "securityContext" not in engine
    assert made["metadata"]["annotations"]["zerowake.dev/digest"] == DIGEST
    (preferred,) = made["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["preference"]["matchFields"][0]["values"] == [world.agent.name]
    assert [volume for volume in made["spec"].get("volumes", []) if "projected" not in volume] == []

    before = SECONDS._sum.get()
    untouched = await world.create(pod("other", labels={"app": "x"}))
    assert untouched["spec"]["containers"][0]["command"] == ENGINE["command"] and "affinity" not in untouched["spec"]
    assert not await world.restored(pod("capture", labels={"zerowake.dev/snapshot": "chat", "zerowake.dev/capture": "chat"}))
    assert SECONDS._sum.get() == before, "the API server did not even ask"
    assert not await world.restored(pod("chat-2", annotations={"zerowake.dev/restore": "false"}))
    assert not await world.restored(pod("chat-3", labels={"zerowake.dev/snapshot": "nobody"}))


async def test_a_namespace_that_allows_little(world: World) -> None:
    """Pod Security refuses a pod after webhooks have changed it: what ours adds is allowed everywhere."""
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    await world.api.merge("Namespace", "", world.namespace, {"metadata": {"labels": level}})
    own: Object = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "runAsUser": 1000, "capabilities": {"drop": ["ALL"]}}
    own["seccompProfile"] = {"type": "RuntimeDefault"}
    assert await world.restored(pod("chat-1", securityContext=own))


async def test_it_follows_the_snapshots(world: World) -> None:
    assert await world.restored(pod("chat-1"))
    no = {"type": "Ready", "status": "False", "reason": "NotResident", "lastTransitionTime": "2026-11-22T06:00:00Z"}
    await world.api.merge("ModelSnapshot", world.namespace, "chat", {"status": {"conditions": [no]}}, "status")
    async with asyncio.timeout(10):
        while await world.restored(pod("chat-1")):
            await asyncio.sleep(0.05)


async def test_without_an_answer_the_pod_starts(world: World) -> None:
    """Failure policy Ignore: whatever happened to the scaler."""
    (world.folder / "tls.crt").write_text("broken")  # a renewal that went wrong: the old certificate goes on serving
    assert await world.restored(pod("chat-1"))
    await world.serving.aclose()
    begun = time.monotonic()
    assert not await world.restored(pod("chat-2"))
    assert time.monotonic() - begun < 5


async def test_where_nobody_answered_it_is_asked_once_more(world: World) -> None:
    """A replica that was lost with its node, and whoever else does not answer: the connection is never taken."""

    def asked() -> float:
        return sum(sample.value for metric in PODS.collect() for sample in metric.samples if sample.name.endswith("_total"))

    for name in ("chat", "nobody"):  # one that is marked, and one that is left as it is
        before = asked()
        await world.create(pod("chat-1", labels={"zerowake.dev/snapshot": name}))
        assert asked() == before + 1, "whom it had answered, it was asked about again"
    first, again = world.hook["webhooks"]
    live, nobody = again["clientConfig"], {"caBundle": again["clientConfig"]["caBundle"], "url": "https://192.0.2.1/mutate-pods"}
    first["clientConfig"] = nobody
    for again["clientConfig"], is_restored in ((nobody, False), (live, True)):
        await world.api.apply(world.hook)
        async with asyncio.timeout(60):  # the API server has to hear of it
            while await world.restored(pod("chat-1")) is not is_restored:
                await asyncio.sleep(0.2)


async def test_how_long_it_takes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    took: dict[str, list[float]] = {"asked": [], "not asked": []}
    for number in range(150):
        for kind, labels in (("asked", None), ("not asked", {"app": "x"})):
            begun = time.perf_counter()
            await world.create(pod(f"chat-{number}", labels=labels))
            took[kind].append(1000 * (time.perf_counter() - begun))
    with capsys.disabled():
        for kind, each in took.items():
            print(f"\n  pod created, webhook {kind}: p50 {statistics.median(each):.1f} ms, p99 {sorted(each)[-2]:.1f} ms", end="")
        print()
    assert statistics.median(took["asked"]) - statistics.median(took["not asked"]) < 10
