"""The ModelSnapshot controller over an API server, and agents that do what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.kubernetes.controller import Controller
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.pod_patch import NodeSetup
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, REPORTER, SCALED_OBJECTS, ModelSnapshot
from scaler.kubernetes.scaled_object import ScaledObject
from scaler.kubernetes.source_conditions import SourceConditions
from scaler.kubernetes.source_declarations import declare_sources
from scaler.kubernetes.taken_names import TakenNames
from scaler.sources.watch import Sources
from tests.worlds.fake_agent import Agent
from tests.worlds.kubernetes_api import Api
from tests.worlds.waiting import until
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.resource import PODS
from zerowake_shared.pod_contract import SNAPSHOT

DIGEST, OTHER = "ab" * 32, "cd" * 32
TEMPLATE = {
    "metadata": {"labels": {"app": "chat"}},
    "spec": {
        "containers": [
            {"name": "engine", "image": "engine:1", "command": ["serve"], "args": ["$(PORT)"], "livenessProbe": {"httpGet": {"port": 80}}}
        ]
    },
}


class World:
    def __init__(self, api: Api, cluster: Cluster, stack: AsyncExitStack) -> None:
        self.api = api
        self.cluster = cluster
        self.agents: dict[str, Agent] = {}
        self._stack = stack
        ledger = Ledger()
        self.nodes = Nodes(Readiness(Dispatcher(ledger)), Activations())
        self.informer = cluster.follow(MODEL_SNAPSHOTS, ModelSnapshot)
        self.labelled = cluster.follow(PODS, EnginePod, labels=SNAPSHOT)
        self.models = Models(ledger)
        self.models.follow(self.informer, cluster.follow(SCALED_OBJECTS, ScaledObject))
        self.names = TakenNames(cluster, self.models)
        self.sources = Sources(ledger)
        declare_sources(self.models, self.sources, {"127.0.0.1"})
        self.conditions = SourceConditions(self.models, self.sources)
        setup = NodeSetup({"zerowake": "yes"})
        self.controller = Controller(cluster, self.informer, self.nodes, setup, self.labelled, self.names, self.conditions)
        self._task: asyncio.Task[None] | None = None

    async def node(self, name: str) -> Agent:
        agent = self.agents[name] = Agent(name)
        await self.api.put("nodes", {"metadata": {"name": name}})
        await self._stack.enter_async_context(self.nodes.follow(await self._stack.enter_async_context(agent.serve())))
        return agent

    async def lead(self) -> None:
        self._task = asyncio.create_task(self.controller.run())

    async def step_down(self) -> None:
        assert self._task
        self._task.cancel()
        await asyncio.wait([self._task])

    async def snapshot(self, name: str = "chat", **spec: Any) -> None:
        await self.api.put("modelsnapshots", {"metadata": {"name": name, "namespace": "tenant"}, "spec": spec or {"template": TEMPLATE}})

    def status(self, name: str = "chat") -> dict[str, Any]:
        found = self.api.get("modelsnapshots", "tenant", name)
        return (found or {}).get("status") or {}

    def condition(self, kind: str, name: str = "chat") -> tuple[str, str, str]:
        found = next((each for each in self.status(name).get("conditions", []) if each["type"] == kind), {})
        return found.get("status", ""), found.get("reason", ""), found.get("message", "")

    def pods(self) -> list[dict[str, Any]]:
        return self.api.all("pods")

    async def says(self, annotation: str, value: str) -> None:
        """What the agent writes on the capture pod."""
        await until(self.pods)
        pod = self.pods()[0]["metadata"]
        await self.api.change("pods", "tenant", pod["name"], {"metadata": {"annotations": {annotation: value}}, "spec": {"nodeName": "n1"}})

    def reasons(self) -> list[str]:
        return [each["reason"] for each in self.api.all("events")]


@asynccontextmanager
async def controlled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """It leads, and waits less than it would."""
    monkeypatch.setattr("scaler.kubernetes.failed_capture.FIRST_RETRY_SECONDS", 0.3)
    monkeypatch.setattr("scaler.kubernetes.storing.FIRST_RETRY_SECONDS", 0.3)
    for file in ("artifact", "residence", "removal"):
        monkeypatch.setattr(f"scaler.kubernetes.{file}.ABSENT_AGENT_SECONDS", 0.2)
    api = Api()
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(api.connected(folder, monkeypatch, REPORTER))
        world = World(api, cluster, stack)
        await stack.enter_async_context(world.sources)
        await stack.enter_async_context(world.informer)
        await stack.enter_async_context(world.labelled)
        await world.lead()
        yield world
        await world.step_down()
