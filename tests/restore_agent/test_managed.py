"""Which snapshots of a node are a controller's to remove: for how long that is known, and what an agent removes for it, over gRPC."""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.sequences.travel import Travel
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.compatibility import node_fits
from restore_agent.snapshots.managed import Managed
from restore_agent.snapshots.manifest import CONTAINER_FILE, TemplateRecord
from restore_agent.snapshots.pins import Pin
from restore_agent.snapshots.store import Store
from tests.worlds.agent_service import World, reference, refused, served_node
from tests.worlds.snapshots import draft
from tests.worlds.travelling import node

MIB = 1 << 20


def test_it_is_known_to_the_next_agent_until_it_is_a_persons_or_has_gone(tmp_path: Path) -> None:
    for digest in ("a", "b", "c"):
        (tmp_path / "snapshots" / digest).mkdir(parents=True)
    managed = Managed(tmp_path)
    for digest in ("a", "b", "c"):
        managed.add(digest)
    managed.remove("b")
    managed.remove("never")
    (tmp_path / "snapshots/c").rmdir()
    assert [each in Managed(tmp_path) for each in ("a", "b", "c", "never")] == [True, False, False, False]
    assert "b" not in managed and "a" in managed


class Fleet:
    """A node with an agent, and a store in a folder that has a snapshot of a pod, `pod`, and one of a process, `own`."""

    def __init__(self, world: World, url: str, pod: Snapshot, own: Snapshot) -> None:
        self.world, self.url, self.pod, self.own = world, url, pod, own

    async def fetched(self, snapshot: Snapshot) -> pb.Residency:
        """As a controller has it fetched."""
        request = pb.StageRequest(request_id=secrets.token_hex(4), snapshot=reference(snapshot), rung=pb.RUNG_DISK, stores=[self.url])
        return (await self.world.stub.Stage(request)).residency

    async def pulled(self, snapshot: Snapshot) -> None:
        """As a person does."""
        request = pb.PullRequest(request_id=secrets.token_hex(4), snapshot=reference(snapshot), stores=[self.url], replace=True)
        async for _ in self.world.stub.Pull(request):
            """Its progress is nobody's."""

    def unstage(self, snapshot: Snapshot) -> grpc.aio.UnaryUnaryCall:
        request = pb.UnstageRequest(request_id=secrets.token_hex(4), snapshot=reference(snapshot), rung=pb.RUNG_ABSENT, orphan=True)
        return self.world.stub.Unstage(request)

    async def told(self) -> dict[str, bool]:
        """By name, as who begins to watch hears it."""
        found: dict[str, bool] = {}
        async for update in self.world.stub.Watch(pb.WatchRequest()):
            if update.synced:
                return found
            if update.HasField("residency"):
                found[update.residency.snapshot.name] = update.residency.managed
        raise AssertionError("the stream has ended")


def published(store: Store, name: str, **fields: object) -> Snapshot:
    workspace = store.workspace()
    if fields:
        (workspace / CONTAINER_FILE).write_bytes(b"{}")
    with store.chunks.lease() as lease:
        content = random.Random(name).randbytes(MIB)
        return store.publish(
            workspace, draft(lease, workspace, content, name, fits=node_fits("0", [], None), **fields), lease, replace=True
        )


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    (tmp_path / "remote").mkdir()
    url = f"file://{tmp_path}/remote"
    async with served_node(tmp_path) as world:
        with node(tmp_path / "origin") as origin:
            pod, own = published(origin, "pod", template=TemplateRecord(hash="t")), published(origin, "own")
            for each in (pod, own):
                await Travel(origin, lambda snapshot: None).push(each, url, lambda progress: None)
            public = origin.keyring.public_file(origin.keyring.signing)
            assert public is not None
            world.node.store.keyring.trust(public.read_bytes())
        yield Fleet(world, url, pod, own)


async def test_what_a_controller_had_fetched_is_removed_when_nobody_asks_for_it(fleet: Fleet) -> None:
    assert (await fleet.fetched(fleet.pod)).managed
    assert not (await fleet.fetched(fleet.own)).managed, "it was taken of no pod: a person's"
    assert await fleet.told() == {"pod": True, "own": False}
    code, why, reason = await refused(fleet.unstage(fleet.own))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "not-orphaned") and "brought to this node by hand" in why
    assert (await fleet.unstage(fleet.pod)).residency.rung == pb.RUNG_ABSENT
    assert await fleet.told() == {"own": False}
    assert (await refused(fleet.unstage(fleet.pod)))[0] is grpc.StatusCode.NOT_FOUND
    store = fleet.world.node.store
    assert fleet.pod.digest not in Managed(store.state)
    assert {link.name for link in store.names()} == {"own"}
    store.verify(store.get("default", "own"))


async def test_what_a_person_pulls_is_theirs_also_where_it_was_fetched_before(fleet: Fleet) -> None:
    await fleet.fetched(fleet.pod)
    await fleet.pulled(fleet.pod)
    assert await fleet.told() == {"pod": False}
    assert (await refused(fleet.unstage(fleet.pod)))[2] == "not-orphaned"
    assert not (await fleet.fetched(fleet.pod)).managed, "it was here: the controller has had nothing fetched"
    await fleet.pulled(fleet.own)
    assert await fleet.told() == {"pod": False, "own": False}


async def test_what_is_pinned_or_in_use_stays(fleet: Fleet) -> None:
    await fleet.fetched(fleet.pod)
    store = fleet.world.node.store
    found = store.get("default", "pod")
    store.pins.put(found.digest, Pin.DISK)
    assert "is pinned on this node; it stays until" in (await refused(fleet.unstage(fleet.pod)))[1]
    store.pins.put(found.digest, None)
    with store.hold(found):
        assert "is in use on this node; it stays until that has ended" in (await refused(fleet.unstage(fleet.pod)))[1]
    assert await fleet.told() == {"pod": True}
    await fleet.unstage(fleet.pod)
    assert await fleet.told() == {}
