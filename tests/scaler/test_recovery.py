"""A snapshot that all nodes have lost: its store gives it back, and only what the store cannot give is captured again."""

import pytest

from scaler.kubernetes import recovery
from scaler.kubernetes.declarations import planned
from scaler.plan.world import Stored
from tests.worlds.controlled import DIGEST, TEMPLATE, World
from tests.worlds.fake_agent import Agent
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import CAPTURED

STORE = "s3://bucket/models"


async def stored(world: World) -> Agent:
    """It was captured and stored; the agent of its node."""
    agent = world.agents["n0"]
    await world.snapshot(template=TEMPLATE, store=STORE)
    await world.says(CAPTURED, DIGEST)
    agent.has("tenant", "chat", DIGEST, size=7, gpu=5)
    await until(lambda: world.condition("Stored")[0] == "True" and not world.pods())
    return agent


async def test_it_is_fetched_and_not_captured(world: World) -> None:
    agent = await stored(world)
    agent.loses("tenant", "chat")
    await until(lambda: agent.staged)
    assert (agent.staged[0].snapshot.digest, list(agent.staged[0].stores)) == (DIGEST, [STORE])
    await until(lambda: [each["name"] for each in world.status()["locations"]] == ["n0", STORE])
    await until(lambda: world.status()["phase"] == "Ready")  # the controller may have to hear first that its capture's pod is gone
    assert world.status()["digest"] == DIGEST and not world.pods()
    assert world.condition("Stored")[0] == "True" and "NotFetched" not in world.reasons()


async def test_meanwhile_it_says_where_it_comes_from(world: World) -> None:
    agent = await stored(world)
    agent.store_opens.clear()
    agent.loses("tenant", "chat")
    await until(lambda: world.condition("Ready") == ("False", "NotResident", f"no node has it; it is fetched from {STORE}"))
    assert [each["rung"] for each in world.status()["locations"]] == ["store"] and not world.pods()
    found = world.informer.get("tenant", "chat")
    assert found and planned(found).stored == Stored(STORE, DIGEST, 7, 0, (5,))
    agent.store_opens.set()
    await until(lambda: world.status().get("phase") == "Ready")


async def test_a_node_that_it_does_not_fit_is_passed_over(world: World) -> None:
    other, agent = await world.node("n1"), await stored(world)
    agent.store_fails = ("incompatible", "another kernel")
    agent.loses("tenant", "chat")
    await until(lambda: [each["name"] for each in world.status()["locations"]] == ["n1", STORE])
    assert len(other.staged) == 1 and world.status()["phase"] == "Ready" and not world.pods()


async def test_where_no_node_has_room_it_is_asked_again_and_not_captured(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture would find no more, or take another's: for ever, one after the other."""
    monkeypatch.setattr(recovery, "_FIRST_RETRY_SECONDS", 0.01)
    agent = await stored(world)
    agent.store_fails = ("store-full", "the disk is full")
    agent.loses("tenant", "chat")
    await until(lambda: len(agent.staged) > 2)
    await until(lambda: "could take it from there: node n0: the disk is full" in world.condition("Ready")[2])
    assert not world.pods() and world.status()["digest"] == DIGEST
    agent.store_fails = None
    await until(lambda: world.status()["phase"] == "Ready")


async def test_what_the_store_cannot_give_is_captured_again(world: World) -> None:
    agent = await stored(world)
    agent.store_fails = ("not-in-store", "no snapshot there")
    agent.loses("tenant", "chat")
    await until(world.pods)
    await until(lambda: "NotFetched" in world.reasons())
    await until(lambda: not world.status().get("digest") and world.condition("Stored") == ("", "", ""))
    agent.store_fails = None
    await world.says(CAPTURED, "cd" * 32)
    agent.has("tenant", "chat", "cd" * 32)
    await until(lambda: world.condition("Stored")[0] == "True" and world.status()["digest"] == "cd" * 32)
