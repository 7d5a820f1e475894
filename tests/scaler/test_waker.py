"""Waking through an agent's real gRPC: what it says of it, what it refuses, and what becomes of the request that waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.fleet import waker as module
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.fleet.waker import Waker
from scaler.gateway.dispatcher import Dispatcher
from tests.worlds.fake_agent import Agent
from tests.worlds.waiting import until


class World:
    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.activations = Activations()
        self.ledger = Ledger({"m": ModelLimits(concurrency=1)}, self.activations)
        self.dispatcher = Dispatcher(self.ledger)
        self.nodes = Nodes(Readiness(self.dispatcher), self.activations)
        self.waker = Waker(self.ledger, self.nodes, self.dispatcher)

    async def served_by(self) -> str:
        hold = self.dispatcher.hold("m", "tenant", Priority.NORMAL, 0)
        async with asyncio.timeout(20):
            return (await hold.future).backend.id


@asynccontextmanager
async def world(*asleep: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        made = World(Agent("one"))
        for name in asleep:
            made.agent.runs(name, "m", asleep=agent_pb2.RUNG_PARKED)
        address = await stack.enter_async_context(made.agent.serve())
        stack.push_async_callback(made.dispatcher.close)
        stack.push_async_callback(made.waker.close)
        await stack.enter_async_context(made.nodes.follow(address))
        await until(lambda: made.ledger.demand("m").replicas == len(asleep))
        yield made


async def test_a_request_wakes_one_and_its_activation_says_how() -> None:
    async with world("a") as made:
        assert await made.served_by() == "a"
        activation = made.activations.current("m")
        assert activation
        assert [(each.replica_id, each.activation_id) for each in made.agent.woken] == [("a", activation.id)]
        assert (activation.origin, activation.phases["image"]) == ("parked", 0.25)
        (node,) = made.nodes
        assert node.replicas["a"].sleeps is None and node.replicas["a"].since > 0


async def test_one_that_sleeps_on_is_told_of_and_the_next_is_woken() -> None:
    async with world("a", "b") as made:
        made.agent.asleep_on["a"] = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await made.served_by() == "b"
        assert [each.replica_id for each in made.agent.woken] == ["a", "b"]


async def test_it_is_tried_again_for_as_long_as_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_RETRY_SECONDS", 0.01)
    async with world("a") as made:
        made.agent.asleep_on["a"] = grpc.StatusCode.RESOURCE_EXHAUSTED
        asked = asyncio.create_task(made.served_by())
        await until(lambda: len(made.agent.woken) == 3)
        assert made.ledger.failure("m") == "replica a sleeps and could not be woken: its GPU is full"
        made.agent.asleep_on.clear()
        assert await asked == "a"


async def test_without_an_agent_that_speaks_of_it_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world("a") as made:
        monkeypatch.setattr(made.nodes, "agent_of", lambda _: None)
        made.dispatcher.hold("m", "tenant", Priority.NORMAL, 0)
        await until(lambda: "no agent speaks of it now" in made.ledger.failure("m"))
        assert made.agent.woken == []
