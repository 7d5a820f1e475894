"""ModelSnapshots on the real API server: what its schema refuses, what people read of it, and the controller that serves it.

The agents here are this test's (their streams are real gRPC): what they do in pods is test_pods.py's. Each test's controller knows the
objects of its own namespace only, so that one that is installed is not disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.kubernetes.controller import run_controller
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.election import lead
from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.pod_patch import NodeSetup
from scaler.kubernetes.refusals import Refusals
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, REPORTER, ModelSnapshot
from scaler.kubernetes.source_conditions import SourceConditions
from scaler.kubernetes.taken_names import TakenNames
from scaler.kubernetes.uninstall import remove_all
from scaler.kubernetes.unmatched import Unmatched
from scaler.sources.watch import Sources
from tests.e2e.api import Api, ApiError, Object, path
from tests.e2e.chart import definition, run
from tests.e2e.cluster.layout import PAUSE_IMAGE
from tests.worlds.fake_agent import Agent
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError
from zerowake_shared.kubernetes.resource import PODS
from zerowake_shared.pod_contract import SNAPSHOT

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
async def crd(api: Api, kubeconfig: str) -> AsyncIterator[None]:
    async with definition(api, kubeconfig):
        yield


def template(**spec: Any) -> Object:
    engine = {"name": "engine", "image": PAUSE_IMAGE, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "1000"]}
    return {"metadata": {"labels": {"app": "chat"}}, "spec": {"containers": [engine], "terminationGracePeriodSeconds": 0, **spec}}


def snapshot(name: str = "chat", **spec: Any) -> Object:
    kind = {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot"}
    return {**kind, "metadata": {"name": name}, "spec": spec or {"template": template()}}


ARTIFACT = {"name": "chat", "digest": DIGEST}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (snapshot(model="chat"), "either template .* or artifact"),
        (snapshot(template=template(), model=" chat"), "spec.model.*should match"),
        (snapshot(template=template(), model="a\tb"), "spec.model.*should match"),
        (snapshot(template=template(), names=["sql", "x "]), "spec.names.*should match"),
        (snapshot(template=template(), artifact=ARTIFACT), "either template .* or artifact"),
        (snapshot(template=template(), container="nobody"), "container is the name of none"),
        (snapshot(template=template(hostPID=True)), "host's namespaces"),
        (snapshot(template=template(hostNetwork=True)), "host's namespaces"),
        (snapshot(template=template(shareProcessNamespace=True)), "process numbers"),
        (snapshot(template=template(containers=[])), "at least 1 item"),
        (snapshot(template={}), "spec.template.spec: Required"),
        (snapshot(artifact={**ARTIFACT, "digest": "latest"}), "spec.artifact.digest"),
        (snapshot(artifact={**ARTIFACT, "name": "../../etc"}), "spec.artifact.name"),
        (snapshot(artifact=ARTIFACT, store="https://bucket/x"), "spec.store"),
        (snapshot(artifact=ARTIFACT, store="s3://key:secret@bucket/x"), "spec.store"),
        (snapshot(artifact=ARTIFACT, store="file://host/x"), "spec.store"),
        (snapshot(artifact=ARTIFACT, copies=0), "spec.copies"),
        (snapshot(artifact=ARTIFACT, port=0), "spec.port"),
        (snapshot(artifact=ARTIFACT, healthPath="health"), "spec.healthPath"),
        (snapshot(artifact=ARTIFACT, stage="gpu"), "spec.stage"),
        (snapshot(artifact=ARTIFACT, idle="memory"), "spec.idle"),
        (snapshot(artifact=ARTIFACT, idleSeconds=0), "spec.idleSeconds"),
        (snapshot(artifact=ARTIFACT, limits={"maxWaitSeconds": 0}), "maxWaitSeconds"),
        (snapshot(artifact=ARTIFACT, limits={"concurrency": 0}), "concurrency"),
        (snapshot(artifact=ARTIFACT, canary={"body": {}}), "spec.canary.path: Required"),
        (snapshot("n" * 64, artifact=ARTIFACT), "at most 63 characters"),
    ],
)
async def test_what_the_schema_refuses(api: Api, namespace: str, wrong: Object, message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        await api.apply(wrong, namespace=namespace, dry_run=True)
    assert error.value.status == 422


async def test_what_it_takes_and_fills_in(api: Api, namespace: str) -> None:
    canary = {"path": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1, "deep": [{"any": 1}]}}
    given = snapshot(template=template(runtimeClassName="nvidia", nodeName=""), container="engine", canary=canary)
    (made,) = await api.apply(given, namespace=namespace)
    spec = made["spec"]
    assert spec["template"]["spec"]["runtimeClassName"] == "nvidia", "a pod's fields are kept, whatever they are"
    assert spec["canary"] == canary
    assert spec["port"] == 8000 and spec["healthPath"] == "/health" and spec["stage"] == "memory"
    assert (spec["idle"], spec["idleSeconds"]) == ("drop", 300)
    assert spec["limits"] == {"concurrency": 8, "maxWaitSeconds": 300, "maxRequests": 10000}
    with pytest.raises(ApiError, match="nothing"):
        await api.ask("POST", path("ModelSnapshot", namespace), {"fieldValidation": "Strict"}, snapshot("b", nothing=1))
    await api.delete("ModelSnapshot", namespace, "chat")


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("", "zerowake.dev/snapshot are restored instead of started"),
        (".spec.stage", "The rung on which it waits for a request"),
        (".spec.template.spec.hostNetwork", "the engine has a network of its own"),
        (".spec.sources.type", "what another gateway posts"),
        (".status.conditions.reason", "in one word for programs"),
    ],
)
async def test_kubectl_explains_its_fields(kubeconfig: str, field: str, says: str) -> None:
    """The API server publishes what a definition says a moment after it has taken it."""
    async with asyncio.timeout(60):
        while True:
            try:
                shown = await asyncio.to_thread(run, kubeconfig, "kubectl", "explain", f"modelsnapshot{field}")
            except AssertionError as error:
                assert "explain" in str(error)
            else:
                if says in " ".join(shown.split()):
                    return
            await asyncio.sleep(0.5)


class World:
    def __init__(self, api: Api, cluster: Cluster, namespace: str, nodes: Nodes, agent: Agent) -> None:
        self.api = api
        self.cluster = cluster
        self.namespace = namespace
        self.nodes = nodes
        self.agent = agent

    async def status(self, holds: Callable[[Object], object], name: str = "chat") -> Object:
        found = await self.api.until("ModelSnapshot", self.namespace, name, lambda one: one and holds(one.get("status") or {}))
        assert found
        status: Object = found["status"]
        return status

    async def capture_pod(self) -> Object:
        async for kind, pod in self.api.watch("Pod", self.namespace, "zerowake.dev/capture=chat"):
            if kind != "DELETED" and not pod["metadata"].get("deletionTimestamp"):
                return pod
        raise AssertionError("unreachable: a watch has no end")

    async def says(self, pod: Object, **annotations: str) -> None:
        change = {"metadata": {"annotations": {f"zerowake.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}}}
        await self.api.merge("Pod", self.namespace, pod["metadata"]["name"], change)


@contextlib.asynccontextmanager
async def controlling(cluster: Cluster, namespace: str, nodes: Nodes, identity: str) -> AsyncIterator[None]:
    async with (
        cluster.follow(MODEL_SNAPSHOTS, ModelSnapshot, namespace=namespace) as snapshots,
        cluster.follow(PODS, EnginePod, namespace=namespace, labels=SNAPSHOT) as labelled,
    ):
        ledger = Ledger()
        models = Models(ledger)
        controller = run_controller(
            cluster,
            snapshots,
            nodes,
            NodeSetup(),
            labelled=labelled,
            names=TakenNames(cluster, models),
            unmatched=Unmatched(cluster, models),
            refusals=Refusals(cluster, snapshots),
            sources=SourceConditions(models, Sources(ledger)),
            namespace=namespace,
            identity=identity,
        )
        task = asyncio.create_task(controller)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture
async def world(api: Api, namespace: str, kubeconfig: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    node = (await api.list("Node"))[0]["metadata"]["name"]
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster.connect(reporter=REPORTER, instance="test"))
        nodes, agent = Nodes(Readiness(Dispatcher(Ledger())), Activations()), Agent(node)
        await stack.enter_async_context(nodes.follow(await stack.enter_async_context(agent.serve())))
        await stack.enter_async_context(controlling(cluster, namespace, nodes, "one"))
        yield World(api, cluster, namespace, nodes, agent)
        async with asyncio.timeout(60):
            for each in await api.list("ModelSnapshot", namespace):
                await api.delete("ModelSnapshot", namespace, each["metadata"]["name"])
                await api.until("ModelSnapshot", namespace, each["metadata"]["name"], lambda one: one is None)


async def test_a_capture_from_the_template_to_its_removal(world: World, kubeconfig: str) -> None:
    await world.api.apply(snapshot(), namespace=world.namespace)
    wait = ("kubectl", "-n", world.namespace, "wait", "--for=condition=Ready", "modelsnapshot/chat", "--timeout=120s")
    waiting = asyncio.create_task(asyncio.to_thread(run, kubeconfig, *wait))
    pod = await world.capture_pod()
    assert pod["metadata"]["annotations"]["zerowake.dev/container"] == pod["spec"]["containers"][0]["name"]
    owner = pod["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["name"], owner["controller"]) == ("ModelSnapshot", "chat", True)
    await world.status(lambda status: status.get("phase") == "Capturing")
    world.agent.has(world.namespace, "chat", DIGEST, size=229_000_000)
    await world.says(pod, captured=DIGEST)
    status = await world.status(lambda status: status.get("phase") == "Ready")
    assert status["locations"] == [{"name": world.agent.name, "rung": "memory"}] and status["digest"] == DIGEST
    conditions = {each["type"]: each["status"] for each in status["conditions"]}
    assert (conditions["Captured"], conditions["Ready"]) == ("True", "True")
    assert all(each["reason"] for each in status["conditions"])
    assert "modelsnapshot.zerowake.dev/chat condition met" in await waiting
    await world.api.until("Pod", world.namespace, pod["metadata"]["name"], lambda one: one is None)

    shown = await asyncio.to_thread(run, kubeconfig, "kubectl", "-n", world.namespace, "get", "msnap")
    head, row = shown.splitlines()
    assert head.split() == ["NAME", "PHASE", "READY", "REASON", "NODES", "RUNGS", "ASLEEP", "BYTES", "AGE"]
    assert row.split()[:3] == ["chat", "Ready", "True"] and world.agent.name in row and "memory" in row and "229000000" in row
    events = [
        (each["reason"], each["type"])
        for each in await world.api.list("Event", world.namespace)
        if each["involvedObject"]["name"] == "chat"
    ]
    assert events == [("Captured", "Normal")]

    await world.api.delete("ModelSnapshot", world.namespace, "chat")
    await world.api.until("ModelSnapshot", world.namespace, "chat", lambda one: one is None)
    assert not world.agent.residencies and world.agent.unstaged[0].snapshot.digest == DIGEST


async def test_a_failed_capture(world: World) -> None:
    await world.api.apply(snapshot(), namespace=world.namespace)
    pod = await world.capture_pod()
    await world.says(pod, capture_failed="the engine was never healthy")
    status = await world.status(lambda status: status.get("phase") == "Failed")
    (captured,) = [each for each in status["conditions"] if each["type"] == "Captured"]
    assert (captured["status"], captured["reason"], captured["message"]) == ("False", "CaptureFailed", "the engine was never healthy")
    await world.api.until(
        "Pod", world.namespace, pod["metadata"]["name"], lambda one: one is None or one["metadata"]["uid"] != pod["metadata"]["uid"]
    )


async def test_a_namespace_that_refuses_the_pod_says_so(world: World) -> None:
    await world.api.merge("Namespace", "", world.namespace, {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
    await world.api.apply(snapshot(), namespace=world.namespace)
    status = await world.status(lambda status: status.get("phase") == "Failed")
    assert "PodSecurity" in status["conditions"][0]["message"]


async def test_an_artifact_is_adopted(world: World) -> None:
    world.agent.has(world.namespace, "made-by-hand", DIGEST, rung=agent_pb2.RUNG_DISK)
    await world.api.apply(snapshot("mine", artifact={"name": "made-by-hand", "digest": DIGEST}), namespace=world.namespace)
    status = await world.status(lambda status: status.get("phase") == "Ready", "mine")
    assert status["locations"] == [{"name": world.agent.name, "rung": "disk"}]


async def test_two_replicas_one_leads(world: World, api: Api) -> None:
    """The second one takes over, where the first one was in the middle of a capture."""
    async with contextlib.AsyncExitStack() as first:
        leading: list[str] = []

        async def work(name: str) -> None:
            leading.append(name)
            try:
                await asyncio.Event().wait()
            finally:
                leading.remove(name)

        tasks = [
            asyncio.create_task(lead(world.cluster, world.namespace, "test", name, lambda name=name: work(name))) for name in ("a", "b")
        ]
        first.callback(lambda: [task.cancel() for task in tasks])
        async with asyncio.timeout(20):
            while not leading:
                await asyncio.sleep(0.05)
            await asyncio.sleep(3)
            assert len(leading) == 1
            gone = leading[0]
            tasks["ab".index(gone)].cancel()
            while leading in ([], [gone]):
                await asyncio.sleep(0.05)
        lease = await api.ask("GET", f"/apis/coordination.k8s.io/v1/namespaces/{world.namespace}/leases/test")
        assert lease["spec"]["holderIdentity"] == leading[0] != gone and lease["spec"]["leaseTransitions"] == 2


async def test_removal_before_an_uninstall(world: World, kubeconfig: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world.agent.has(world.namespace, "chat", DIGEST)
    await world.api.apply(snapshot(artifact=ARTIFACT), namespace=world.namespace)
    await world.status(lambda status: status.get("phase") == "Ready")

    class Bounded:
        """The cluster as far as this test may empty it."""

        def follow(self, *args: Any, **options: Any) -> Any:
            return world.cluster.follow(*args, **options, namespace=world.namespace)

        delete, patch = world.cluster.delete, world.cluster.patch

    bounded: Any = Bounded()
    assert await remove_all(bounded, 30)
    assert not world.agent.residencies
    # With nobody to lift the finalizer it is given up, and one of somebody else's is said.
    orphan = snapshot("orphan", artifact=ARTIFACT)
    orphan["metadata"]["finalizers"] = ["somebody.else/holds"]
    await world.api.apply(orphan, namespace=world.namespace)
    monkeypatch.setattr("scaler.kubernetes.uninstall._FORCED_SECONDS", 1.0)
    with pytest.raises(ClusterError, match="orphan: look for finalizers of others"):
        await remove_all(bounded, 2)
    await world.api.merge("ModelSnapshot", world.namespace, "orphan", {"metadata": {"finalizers": None}})
