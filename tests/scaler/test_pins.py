"""Pins of snapshots that no model has any more: which are taken back, by an agent's calls. The agent's own part: tests/restore_agent."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.local.pins import take_back
from tests.worlds.fake_agent import Agent


@pytest.mark.parametrize("refuses", [None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_those_that_no_model_has_are_taken_back(refuses: grpc.StatusCode | None, caplog: pytest.LogCaptureFixture) -> None:
    agent, nodes = Agent("n"), Nodes(Readiness(Dispatcher(Ledger({}))), Activations())
    for name in ("kept", "gone", "never pinned"):
        agent.has("ns", name, f"digest of {name}")
    for name in ("kept", "gone"):
        agent.residencies["ns", name].pinned = agent_pb2.RUNG_MEMORY
    agent.refuse = refuses
    async with agent.serve() as address, nodes.follow(address):
        taking = asyncio.create_task(take_back(nodes, address, {SnapshotName("ns", "kept")}))
        if refuses is grpc.StatusCode.UNAVAILABLE:
            async with asyncio.timeout(10):
                while not agent.pinned:
                    await asyncio.sleep(0.01)
            agent.refuse = None
        await asyncio.wait_for(taking, 10)
    assert {(each.snapshot.digest, each.rung) for each in agent.pinned} == {("digest of gone", agent_pb2.RUNG_ABSENT)}
    pinned = {name for (_, name), each in agent.residencies.items() if each.pinned == agent_pb2.RUNG_MEMORY}
    refused = refuses is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert pinned == ({"kept", "gone"} if refused else {"kept"})
    assert ("ns/gone stays pinned, though no model has it any more: its disk is read-only" in caplog.text) is refused
