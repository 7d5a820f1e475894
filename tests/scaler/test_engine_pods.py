"""Pods as the kubelet reports them, and which of them are sent requests: alone, and beside what an agent says of the same pods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from scaler.books.ledger import Ledger
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.engine_pods import EnginePods
from scaler.kubernetes.resources import ModelSnapshot
from scaler.kubernetes.scaled_object import ScaledObject
from tests.worlds.echo_engine import Engine
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import replica_id

CONTAINER = "containerd://0123456789abcdef0123456789abcdef"
STARTED, LATER, BEFORE = "2026-11-26T18:00:05Z", "2026-11-26T18:01:00Z", "2026-11-26T18:00:00Z"
PROBE = {"httpGet": {"path": "/health", "port": 8000}}


class Informer:
    """What an informer does to whoever reads it and listens."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Any] = {}
        self.callbacks: list[Callable[[Any, Any], None]] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.objects.values())

    def get(self, namespace: str, name: str) -> Any:
        return self.objects.get((namespace, name))

    def on_change(self, callback: Callable[[Any, Any], None]) -> None:
        self.callbacks.append(callback)
        for found in self:
            callback(None, found)

    def put(self, found: Any) -> None:
        key = found.metadata.namespace, found.metadata.name
        old = self.objects.get(key)
        self.objects[key] = found
        for callback in self.callbacks:
            callback(old, found)

    def drop(self, name: str, namespace: str = "tenant") -> None:
        gone = self.objects.pop((namespace, name))
        for callback in self.callbacks:
            callback(gone, None)


class World:
    def __init__(self) -> None:
        self.ledger = Ledger()
        self.dispatcher = Dispatcher(self.ledger)
        self.readiness = Readiness(self.dispatcher)
        self.models = Models(self.ledger)
        self.snapshots, self.objects, self.pods = Informer(), Informer(), Informer()
        self.models.follow(self.snapshots, self.objects)

    def snapshot(self, name: str = "chat", namespace: str = "tenant", **spec: Any) -> None:
        metadata = {"name": name, "namespace": namespace, "creationTimestamp": BEFORE, "uid": f"{namespace}/{name}"}
        self.snapshots.put(msgspec.convert({"metadata": metadata, "spec": spec}, ModelSnapshot))

    def pod(self, name: str = "p", **changes: Any) -> None:
        self.pods.put(msgspec.convert(pod(name, **changes), EnginePod))

    def ready(self, model: str = "chat") -> list[Endpoint]:
        return [each.endpoint for each in self.dispatcher.ready(model)]


def pod(
    name: str = "p",
    *,
    namespace: str = "tenant",
    ready: str = "True",
    since: str = LATER,
    container: str = CONTAINER,
    runs: bool = True,
    host: str = "10.0.0.7",
    engine: dict[str, Any] | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    state = {"running": {"startedAt": STARTED}} if runs else {"terminated": {"exitCode": 1}}
    metadata.setdefault("labels", {"zerowake.dev/snapshot": "chat"})
    containers = [{"name": "sidecar"}, {"name": "engine", "readinessProbe": PROBE, **(engine or {})}]
    return {
        "metadata": {"name": name, "namespace": namespace, "uid": name, **metadata},
        "spec": {"nodeName": "n1", "containers": containers},
        "status": {
            "podIP": host,
            "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": since}],
            "containerStatuses": [
                {"name": "sidecar", "containerID": "containerd://ffffffffffffffff", "state": {"running": {"startedAt": STARTED}}},
                {"name": "engine", "containerID": container, "state": state},
            ],
        },
    }


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    made = World()
    async with EnginePods(made.readiness, made.models, made.snapshots).following(made.pods):
        yield made
    await made.dispatcher.close()


async def test_a_ready_pod_serves_where_no_agent_speaks() -> None:
    async with world() as made:
        made.snapshot(container="engine", port=9000)
        made.pod(ready="False", since=BEFORE)
        assert made.ready() == []
        made.pod()
        assert made.ready() == [Endpoint("10.0.0.7", 9000)]
        made.pod(ready="False")
        assert made.ready() == []
        assert made.ledger.demand("chat").replicas == 1  # what runs there goes on
        made.pod()
        assert len(made.ready()) == 1
        made.pod(deletionTimestamp=LATER)
        assert made.ready() == []
        made.pods.drop("p")
        assert made.ledger.demand("chat").replicas == 0


async def test_one_engine_that_both_speak_of_is_one_replica() -> None:
    async with world() as made:
        made.snapshot(container="engine")
        backend = Backend(replica_id("p", CONTAINER), "chat", Endpoint("10.0.0.7", 8000))
        made.readiness.agent_ready(backend)
        made.pod(ready="False", since=BEFORE)  # the kubelet has not asked it yet
        assert made.ready() == [backend.endpoint]
        made.pod()
        made.readiness.agent_silent(backend.id)  # the agent crashed, and its successor does not start
        assert made.ready() == [backend.endpoint]
        made.readiness.agent_ready(backend)
        assert made.ledger.demand("chat").replicas == 1


async def test_a_container_that_was_started_anew_is_another_replica() -> None:
    async with world() as made:
        made.snapshot(container="engine")
        made.pod()
        (first,) = made.dispatcher.ready("chat")
        made.pod(runs=False, ready="False")
        assert made.ledger.demand("chat").replicas == 0
        made.pod(container="containerd://fedcba9876543210")
        (second,) = made.dispatcher.ready("chat")
        assert first.id != second.id


@pytest.mark.parametrize(
    ("snapshot", "changes", "port"),
    [
        ({"container": "engine", "port": 9000}, {}, 9000),
        ({"container": "engine", "port": 9000}, {"annotations": {"zerowake.dev/port": "9001"}}, 9001),  # as the webhook has marked it
        (None, {"annotations": {"zerowake.dev/container": "engine"}}, 8000),  # its probe's
        (None, {"annotations": {"zerowake.dev/container": "engine"}, "engine": {"readinessProbe": {"tcpSocket": {"port": 7}}}}, 7),
        (
            None,
            {
                "annotations": {"zerowake.dev/container": "engine"},
                "engine": {
                    "ports": [{"containerPort": 1, "name": "metrics"}, {"containerPort": 2, "name": "http"}],
                    "readinessProbe": {"httpGet": {"port": "http"}},
                },
            },
            2,
        ),
        (
            None,
            {
                "annotations": {"zerowake.dev/container": "engine"},
                "engine": {"ports": [{"containerPort": 3}], "readinessProbe": {"exec": {"command": ["true"]}}},
            },
            3,
        ),
    ],
)
async def test_at_which_port(snapshot: dict[str, Any] | None, changes: dict[str, Any], port: int) -> None:
    async with world() as made:
        trigger = {"type": "external-push", "metadata": {"model": "chat", "scalerAddress": "x:1"}}
        metadata = {"name": "chat", "namespace": "tenant", "creationTimestamp": BEFORE}
        made.objects.put(msgspec.convert({"metadata": metadata, "spec": {"triggers": [trigger]}}, ScaledObject))
        if snapshot is not None:
            made.snapshot(**snapshot)
        made.pod(**changes)
        assert [each.port for each in made.ready()] == [port]


async def test_a_pod_that_nothing_says_a_port_of_is_left_out() -> None:
    async with world() as made:
        trigger = {"type": "external-push", "metadata": {"model": "chat", "scalerAddress": "x:1"}}
        metadata = {"name": "chat", "namespace": "tenant", "creationTimestamp": BEFORE}
        made.objects.put(msgspec.convert({"metadata": metadata, "spec": {"triggers": [trigger]}}, ScaledObject))
        made.pod(engine={"readinessProbe": {"exec": {"command": ["true"]}}}, annotations={"zerowake.dev/container": "engine"})
        assert made.ready() == []


async def test_whose_pods_and_of_which_model() -> None:
    async with world() as made:
        made.pod()  # before anybody declares the model
        made.pod("foreign", namespace="somebody", host="10.0.0.8")
        assert made.ready() == []
        made.snapshot(container="engine")
        assert [each.host for each in made.ready()] == ["10.0.0.7"]
        made.snapshot(container="engine", model="other")
        assert (made.ready(), [each.host for each in made.ready("other")]) == ([], ["10.0.0.7"])
        made.snapshots.drop("chat")
        assert made.ready("other") == []


async def test_a_pod_that_serves_the_model_no_more_finishes_what_it_has() -> None:
    async with world() as made:
        made.snapshot(container="engine")
        made.pod()
        member = made.dispatcher.take("chat")
        assert member is not None
        made.snapshots.drop("chat")
        assert (made.ready(), member.gone) == ([], False)
        made.snapshot(container="engine")
        assert len(made.ready()) == 1
        made.snapshots.drop("chat")
        made.dispatcher.release(member)
        assert member.gone
        assert made.ledger.demands() == {}


async def test_a_container_that_has_ended_takes_its_connections_along() -> None:
    async with world() as made:
        made.snapshot(container="engine")
        made.pod()
        member = made.dispatcher.take("chat")
        assert member is not None
        made.pod(runs=False, ready="False")
        assert member.gone
        made.dispatcher.release(member)


async def test_a_capture_pod_never_serves() -> None:
    async with world() as made:
        made.snapshot(container="engine")
        made.pod(labels={"zerowake.dev/snapshot": "chat", "zerowake.dev/capture": "chat"})
        assert made.ready() == []


async def test_an_engine_without_a_probe_is_asked_for_its_health() -> None:
    async with world() as made, Engine() as engine:
        made.snapshot(container="engine", port=engine.port, healthPath="/health")
        made.pod(host="127.0.0.1", engine={"readinessProbe": None})  # Ready, since its process runs
        assert made.ready() == []
        await until(made.ready)
        made.pod(host="127.0.0.1", engine={"readinessProbe": None})
        assert len(made.ready()) == 1


async def test_a_process_that_does_not_answer_yet_is_not_ready() -> None:
    async with world() as made, Engine() as engine:
        port = engine.port
        await engine.__aexit__(None, None, None)
        made.snapshot(container="engine", port=port)
        made.pod(host="127.0.0.1", engine={"readinessProbe": None})
        (look,) = looks()
        assert made.ready() == []
        async with Engine(port=port):
            await until(made.ready)
        assert look.done()


async def test_an_agents_word_saves_the_question() -> None:
    async with world() as made:
        made.snapshot(container="engine")
        made.readiness.agent_ready(Backend(replica_id("p", CONTAINER), "chat", Endpoint("10.0.0.7", 8000)))
        made.pod(engine={"readinessProbe": None})
        assert (len(made.ready()), looks()) == (1, [])


def looks() -> list[Any]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("health of p.")]
