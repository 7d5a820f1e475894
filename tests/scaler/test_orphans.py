"""Artifacts on nodes that no ModelSnapshot asks for: after how long they go, and what keeps them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2

from restore_agent.snapshots.manifest import CONTAINER_FILE, TemplateRecord
from scaler.kubernetes.orphans import Orphans
from scaler.kubernetes.resources import MODEL_SNAPSHOTS
from tests.worlds.agent_service import served_node
from tests.worlds.controlled import DIGEST, OTHER, World
from tests.worlds.fake_agent import Agent
from tests.worlds.snapshots import draft
from tests.worlds.waiting import until

GRACE = 600.0


class Now:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at


class Looked:
    """Orphans of a world, with another object in it; `n1` has an artifact that is nobody's."""

    def __init__(self, world: World, agent: Agent) -> None:
        self.world, self.agent, self.clock = world, agent, Now()
        self.orphans = Orphans(world.cluster, world.nodes, GRACE, self.clock)

    async def look(self, after: float = 0.0) -> None:
        self.clock.at += after
        await self.orphans.look()

    @property
    def stays(self) -> bool:
        return ("tenant", "gone") in self.agent.residencies


@pytest.fixture
async def looked(world: World) -> Looked:
    agent = await world.node("n1")
    agent.has("tenant", "kept", OTHER, managed=True)
    await world.snapshot("kept", artifact={"name": "kept", "digest": OTHER})
    agent.has("tenant", "gone", DIGEST, managed=True)
    await heard(world, 2)
    return Looked(world, agent)


async def heard(world: World, many: int) -> None:
    await until(lambda: [len(node.residencies) for node in world.nodes if node.name == "n1" and node.synced] == [many])


async def test_it_goes_after_the_grace_with_an_event_of_its_node(looked: Looked) -> None:
    for _ in range(2):
        await looked.look(GRACE / 2)
        assert looked.stays
    await looked.look(GRACE / 2)
    assert not looked.stays and ("tenant", "kept") in looked.agent.residencies
    (asked,) = looked.agent.unstaged
    assert (asked.orphan, asked.rung, asked.snapshot.digest) == (True, agent_pb2.RUNG_ABSENT, DIGEST)
    (event,) = [each for each in looked.world.api.all("events") if each["reason"] == "OrphanRemoved"]
    assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("Node", "n1")
    assert event["note"].startswith(
        f"tenant/gone@{DIGEST[:12]} was removed from the node: no ModelSnapshot of the cluster has asked for it"
    )


async def test_what_an_object_asks_for_meanwhile_has_the_whole_grace_again(looked: Looked) -> None:
    await looked.look()
    await looked.world.snapshot("other", artifact={"name": "gone", "digest": DIGEST})
    await looked.look(GRACE)
    assert looked.stays, "it is named as an artifact"
    await looked.world.cluster.delete(MODEL_SNAPSHOTS, "tenant", "kept")
    await looked.world.api.remove("modelsnapshots", "tenant", "other")
    await looked.world.snapshot("another", artifact={"name": "kept", "digest": OTHER})
    await looked.look()
    await looked.look(GRACE - 1)
    assert looked.stays
    await looked.look(1)
    assert not looked.stays


@pytest.mark.parametrize("what", ["fails", "is empty", "cannot be understood", "fails at its second page"])
async def test_a_list_that_does_not_say_everything_says_nothing(looked: Looked, what: str) -> None:
    api = looked.world.api
    await looked.look()
    if what == "fails":
        api.refuse.append(("GET", "modelsnapshots", 500, "no"))
    elif what == "is empty":
        await api.remove("modelsnapshots", "tenant", "kept")
    elif what == "cannot be understood":
        await api.put("modelsnapshots", {"metadata": {"name": "odd", "namespace": "tenant"}, "spec": {"artifact": "gone"}})
    else:
        await looked.world.snapshot("other", artifact={"name": "other", "digest": OTHER})
        api.page = 1
        api.refuse.append(("GET", "continue=", 500, "no"))
    await looked.look(GRACE)
    assert looked.stays and not looked.agent.unstaged
    if what == "is empty":
        await looked.world.snapshot("kept", artifact={"name": "kept", "digest": OTHER})
    if what == "cannot be understood":
        await api.remove("modelsnapshots", "tenant", "odd")
    await looked.look()
    assert looked.stays, "the grace begins anew"
    await looked.look(GRACE)
    assert not looked.stays


async def test_what_a_person_brought_or_pinned_is_not_asked_for(looked: Looked) -> None:
    looked.agent.has("tenant", "gone", DIGEST)
    looked.agent.has("tenant", "pinned", DIGEST, managed=True)
    looked.agent.residencies["tenant", "pinned"].pinned = agent_pb2.RUNG_DISK
    looked.agent.says(agent_pb2.NodeUpdate(residency=looked.agent.residencies["tenant", "pinned"]))
    await heard(looked.world, 3)
    await until(
        lambda: [key.name for node in looked.world.nodes for key, each in node.residencies.items() if each.managed] == ["kept", "pinned"]
    )
    await looked.look()
    await looked.look(GRACE)
    assert not looked.agent.unstaged and looked.stays


async def test_one_that_is_in_use_is_told_once_and_asked_for_again(looked: Looked, caplog: pytest.LogCaptureFixture) -> None:
    looked.agent.refuse = grpc.StatusCode.FAILED_PRECONDITION
    await looked.look()
    for _ in range(3):
        await looked.look(GRACE)
    assert len(looked.agent.unstaged) == 3 and looked.stays
    told = [each for each in caplog.messages if "is asked for by no ModelSnapshot, and stays: a restore is under way" in each]
    assert len(told) == 1
    looked.agent.refuse = None
    await looked.look()
    assert not looked.stays


async def test_by_itself_with_a_real_agent_and_its_store(world: World, tmp_path: Path) -> None:
    """Beside one of the same node that was taken of no pod."""
    await world.snapshot("kept", artifact={"name": "kept", "digest": OTHER})
    async with served_node(tmp_path) as real:
        store = real.node.store
        for name in ("pod", "own"):
            workspace = store.workspace()
            (workspace / CONTAINER_FILE).write_bytes(b"{}")
            with store.chunks.lease() as lease:
                manifest = draft(lease, workspace, name.encode() * 5000, name, template=TemplateRecord(hash="t"))
                taken = store.publish(workspace, manifest, lease, replace=False)
            if name == "pod":
                store.managed.add(taken.digest)
        async with world.nodes.follow(f"unix:{tmp_path}/agent.sock"):
            removing = asyncio.create_task(Orphans(world.cluster, world.nodes, 0.05).run())
            try:
                await until(lambda: {link.name for link in store.names()} == {"own"})
            finally:
                removing.cancel()
    assert not list((tmp_path / "state/node/managed").iterdir())
