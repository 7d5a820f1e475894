"""ModelSnapshots that are deleted: what the nodes have of them goes first."""

import asyncio

import grpc
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.kubernetes.controller import Controller
from scaler.kubernetes.pod_patch import NodeSetup
from scaler.kubernetes.resources import MODEL_SNAPSHOTS
from tests.worlds.controlled import DIGEST, TEMPLATE, World
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import CAPTURED


async def test_deletion_removes_the_artifact_first(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await world.snapshot()
    await world.says(CAPTURED, DIGEST)
    for agent in (one, two):
        agent.has("tenant", "chat", DIGEST)
        agent.has("other", "chat", DIGEST)
    await until(lambda: len(world.status().get("locations", [])) == 2)
    two.refuse = grpc.StatusCode.FAILED_PRECONDITION
    await world.cluster.delete(MODEL_SNAPSHOTS, "tenant", "chat")
    await until(lambda: world.condition("Ready")[1] == "Deleting")
    assert "node n2: a restore is under way" in world.condition("Ready")[2]
    assert ("tenant", "chat") not in one.residencies and ("tenant", "chat") in two.residencies
    two.refuse = None
    await until(lambda: not world.api.all("modelsnapshots"))
    assert ("tenant", "chat") not in two.residencies
    assert ("other", "chat") in one.residencies and ("other", "chat") in two.residencies
    assert all(request.rung == agent_pb2.RUNG_ABSENT and request.snapshot.digest == DIGEST for request in one.unstaged + two.unstaged)


async def test_deletion_during_a_capture_ends_it_first(world: World) -> None:
    await world.snapshot()
    await until(world.pods)
    await world.api.change("pods", "tenant", world.pods()[0]["metadata"]["name"], {"metadata": {"finalizers": ["test/holds"]}})
    await world.cluster.delete(MODEL_SNAPSHOTS, "tenant", "chat")
    await until(lambda: world.pods()[0]["metadata"].get("deletionTimestamp"))
    await asyncio.sleep(0.2)
    assert world.api.all("modelsnapshots"), "its agent may still be publishing"
    await world.api.remove("pods", "tenant", world.pods()[0]["metadata"]["name"])
    await until(lambda: not world.api.all("modelsnapshots"))


async def test_deletion_waits_for_an_agent_that_is_away_unless_its_node_is_gone(world: World) -> None:
    found = {"template": TEMPLATE}
    await world.snapshot(**found)
    await world.says(CAPTURED, DIGEST)
    agent = await world.node("n1")
    agent.has("tenant", "chat", DIGEST)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    await world.step_down()
    # A new leader that no agent has spoken to yet.
    world.nodes = Nodes(Readiness(Dispatcher(Ledger())), Activations())
    world.controller = Controller(world.cluster, world.informer, world.nodes, NodeSetup(), world.labelled, world.names, world.conditions)
    await world.lead()
    await asyncio.sleep(0.3)
    assert world.status()["phase"] == "Ready" and not world.pods(), "a holder that can't be asked has it still"
    await world.cluster.delete(MODEL_SNAPSHOTS, "tenant", "chat")
    await until(lambda: "n1, whose agent does not answer" in world.condition("Ready")[2])
    await world.api.remove("nodes", "", "n1")
    await until(lambda: not world.api.all("modelsnapshots"))


async def test_two_objects_of_one_artifact_keep_it_for_each_other(world: World) -> None:
    agent = await world.node("n1")
    agent.has("tenant", "chat", DIGEST)
    for name in ("one", "two"):
        await world.snapshot(name, artifact={"name": "chat", "digest": DIGEST})
        await until(lambda name=name: world.status(name).get("phase") == "Ready")
    await world.cluster.delete(MODEL_SNAPSHOTS, "tenant", "one")
    await until(lambda: not world.api.get("modelsnapshots", "tenant", "one"))
    assert ("tenant", "chat") in agent.residencies
    await world.cluster.delete(MODEL_SNAPSHOTS, "tenant", "two")
    await until(lambda: not world.api.get("modelsnapshots", "tenant", "two"))
    assert ("tenant", "chat") not in agent.residencies
