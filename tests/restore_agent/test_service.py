"""The agent's gRPC service, asked by a real client over a socket; the node behind it has no CRIU to work with."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from zerowake_proto import agent_pb2 as pb

from gpumem.client.control import Control
from restore_agent.drivers.criu import CriuError
from restore_agent.errors import AgentError
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.idling import NoRoomToWake
from restore_agent.sequences.inventory import Gpu
from restore_agent.sequences.memory_budget import NoMemory
from restore_agent.sequences.parked_budget import ParkedFull
from restore_agent.sequences.placement import NoGpuMemory
from restore_agent.sequences.replicas import NoReplica
from restore_agent.sequences.rungs import CannotPark
from restore_agent.sequences.standby import Rung
from restore_agent.service import metrics
from restore_agent.snapshots.catalog import Corrupt
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.manifest import TemplateRecord
from restore_agent.snapshots.store import NameTaken
from restore_agent.transfer.source import Unreachable
from tests.worlds.agent_service import World, reference, refused, served_node
from tests.worlds.faulty_source import FaultySource
from tests.worlds.gpumem_server import MIB, make_weights, served
from tests.worlds.snapshots import publish
from tests.worlds.staging import slow
from tests.worlds.waiting import until


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with served_node(tmp_path) as world:
        yield world


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (NoReplica("why"), grpc.StatusCode.NOT_FOUND, "no-replica"),
        (NameTaken("why"), grpc.StatusCode.ALREADY_EXISTS, "exists"),
        (NoMemory("why"), grpc.StatusCode.RESOURCE_EXHAUSTED, "no-memory"),
        (OSError("why"), grpc.StatusCode.RESOURCE_EXHAUSTED, "io-error"),
        (ParkedFull("why"), grpc.StatusCode.RESOURCE_EXHAUSTED, "parked-full"),
        (NoGpuMemory("why", {}), grpc.StatusCode.RESOURCE_EXHAUSTED, "no-gpu-memory"),
        (CannotPark("why"), grpc.StatusCode.FAILED_PRECONDITION, "cannot-park"),
        (Incompatible("why"), grpc.StatusCode.FAILED_PRECONDITION, "incompatible"),
        (Corrupt("why"), grpc.StatusCode.FAILED_PRECONDITION, "corrupt"),
        (CriuError("why"), grpc.StatusCode.FAILED_PRECONDITION, "criu-failed"),
        (RestoreFailed("timeout", "why"), grpc.StatusCode.FAILED_PRECONDITION, "timeout"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_an_error_is_its_status_and_its_reason(
    world: World, monkeypatch: pytest.MonkeyPatch, error: AgentError | OSError, code: grpc.StatusCode, reason: str
) -> None:
    async def fails(_: str) -> None:
        raise error

    monkeypatch.setattr(world.node, "release", fails)
    assert await refused(world.stub.Release(pb.ReleaseRequest(request_id="1", replica_id="x"))) == (code, "why", reason)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda stub, ref: stub.Release(pb.ReleaseRequest(replica_id="x")), "request_id is empty"),
        (lambda stub, ref: stub.Stage(pb.StageRequest(request_id="1", snapshot=ref)), "rung: a snapshot can be staged to"),
        (lambda stub, ref: stub.Unstage(pb.UnstageRequest(request_id="1", snapshot=ref, rung=pb.RUNG_PARKED)), "can be unstaged to"),
        (
            lambda stub, ref: stub.Demote(pb.DemoteRequest(request_id="1", replica_id="x", rung=pb.RUNG_DISK)),
            "rung: a replica can be demoted to",
        ),
        (lambda stub, ref: stub.Restore(pb.RestoreRequest(request_id="1", snapshot=ref)), "model: it is empty"),
        (lambda stub, ref: stub.Restore(pb.RestoreRequest(request_id="1", model="m")), "snapshot and cold are both absent"),
        (lambda stub, ref: stub.Restore(pb.RestoreRequest(request_id="1", model="m", cold=pb.Engine(port=1))), "engine.command: "),
    ],
)
async def test_what_is_wrong_in_a_request_is_named(world: World, call: Callable[[Any, pb.SnapshotRef], Any], says: str) -> None:
    code, text, _ = await refused(call(world.stub, reference(publish(world.node.store, b"x" * 8192))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and says in text


async def test_a_snapshot_that_is_not_there_fails_a_restore_with_its_reason(world: World) -> None:
    missing = pb.SnapshotRef(namespace="default", name="none")
    code, text, reason = await refused(world.stub.Restore(pb.RestoreRequest(request_id="1", model="m", snapshot=missing)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "not-found") and "no snapshot default/none" in text
    code, text, reason = await refused(world.stub.Stage(pb.StageRequest(request_id="1", snapshot=missing, rung=pb.RUNG_DISK)))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "not-found") and "no snapshot default/none" in text


async def test_a_snapshot_goes_up_and_down_its_rungs(world: World) -> None:
    snapshot = publish(world.node.store, b"x" * 8192)
    staged = await world.stub.Stage(pb.StageRequest(request_id="1", snapshot=reference(snapshot), rung=pb.RUNG_DISK))
    assert (staged.residency.rung, staged.residency.snapshot.digest, staged.seconds) == (pb.RUNG_DISK, snapshot.digest, 0.0)
    gone = await world.stub.Unstage(pb.UnstageRequest(request_id="1", snapshot=reference(snapshot), rung=pb.RUNG_ABSENT))
    assert gone.residency.rung == pb.RUNG_ABSENT
    assert not world.node.store.list()


async def test_one_that_is_removed_as_it_is_staged_is_not_said_to_stand_in_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    staging, snapshot = world.node.staging, publish(world.node.store, b"x" * (9 << 20))
    monkeypatch.setattr(staging, "check_fits", lambda manifest: None)
    with slow(world.node.store, monkeypatch, snapshot), staging.hold(snapshot) as staged:
        request = pb.StageRequest(request_id="1", snapshot=reference(snapshot), rung=pb.RUNG_MEMORY)
        staging_call = asyncio.ensure_future(refused(world.stub.Stage(request)))
        await asyncio.wait_for(asyncio.shield(staged.arriving), 20)
        await until(lambda: staged.users == 2, "the call waits for it")
        await world.stub.Unstage(pb.UnstageRequest(request_id="1", snapshot=reference(snapshot), rung=pb.RUNG_ABSENT))
    code, text, reason = await staging_call
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "not-found") and "was removed or replaced meanwhile" in text
    await until(lambda: not staging.held_bytes, "nothing of it stays in memory")
    await staging.close()
    await world.node.headroom.close()


async def test_what_waits_and_what_it_holds_is_shown(world: World) -> None:
    with metrics.shown(world.node):
        metrics.standbys_are({Rung.STANDBY: 2, Rung.PARKED: 1}, {"GPU-1": 3 << 30})
        shown = generate_latest().decode()
        assert 'zerowake_node_standbys{rung="standby"} 2.0' in shown and 'zerowake_node_standbys{rung="parked"} 1.0' in shown
        assert 'zerowake_node_parked_bytes{gpu="GPU-1"} 3.221225472e+09' in shown
        metrics.sleepers_are({Rung.STANDBY: 3, Rung.PARKED: 0})
        assert 'zerowake_node_sleeping_pods{rung="standby"} 3.0' in generate_latest().decode()
        metrics.standbys_are({Rung.STANDBY: 0, Rung.PARKED: 0}, {})
        assert "GPU-1" not in generate_latest().decode(), "nothing is parked there any more"


async def test_what_the_node_has_is_shown_to_prometheus_by_who_has_it(world: World) -> None:
    node = world.node
    node.inventory.gpus = [Gpu("GPU-1", "NVIDIA H200", 80, 30, 10, 20, 5), Gpu("GPU-2", "NVIDIA H200", 80, 80, 80, None, 0)]
    node.travel.sources.failed(FaultySource("s3://b"), Unreachable("nobody answers"))
    with metrics.shown(node):
        shown = generate_latest().decode()
    assert "zerowake_node_staged_bytes 0.0" in shown
    found = dict(re.findall(r'zerowake_node_gpu_bytes{gpu="GPU-1",holder="(\w+)"} (\S+)', shown))
    assert found == {"nobody": "10.0", "gpumem": "20.0", "parked": "5.0", "others": "45.0"}
    found = dict(re.findall(r'zerowake_node_gpu_bytes{gpu="GPU-2",holder="(\w+)"} (\S+)', shown))
    assert found == {"nobody": "80.0", "parked": "0.0"}, "of the others nothing is known"
    assert 'zerowake_node_source_fails{source="s3://b"} 1.0' in shown
    assert "zerowake_node_gpu_bytes" not in generate_latest().decode(), "the node is closed"


async def test_what_gpumem_holds_is_shown_by_use_and_that_it_is_silent(short_folder: Path) -> None:
    weights = make_weights(short_folder / "weights.bin", 8 * MIB)
    async with served_node(short_folder) as world:
        with metrics.shown(world.node):
            assert "zerowake_gpumem" not in generate_latest().decode(), "there is none"
            with served(short_folder, reserve=64 * MIB, arena=32 * MIB) as server:
                async with Control.connected(server.socket) as control:
                    await control.fill(weights.layout, weights.sources, "host")
                    await world.node.weights.view.look()
                    held = {"free": 56, "idle": 8, "weights": 0, "scratch": 0}
                    assert numbers("held") == {use: mib * MIB for use, mib in held.items()}
                    await control.fill(weights.layout, weights.sources, "host", pinned=True)
                    await world.node.weights.view.look()
                    assert numbers("held")["weights"] == 8 * MIB
                    assert sum(numbers("arena").values()) == 32 * MIB
                for line in ('wanted_bytes{gpu="host"} 6.7108864e+07', 'owed_bytes{gpu="host"} 0.0', "up 1.0"):
                    assert f"zerowake_gpumem_{line}" in generate_latest().decode()
                server.process.kill()
                server.process.wait()
                await world.node.weights.view.look()
                shown = generate_latest().decode()
                assert "zerowake_gpumem_up 0.0" in shown and "zerowake_gpumem_held_bytes" not in shown


def numbers(of: str) -> dict[str, float]:
    """Of gpumem's one device, or of its arena, by use."""
    found = re.findall(rf'zerowake_gpumem_{of}_bytes{{(?:gpu="host",)?use="(\w+)"}} (\S+)', generate_latest().decode())
    return {use: float(value) for use, value in found}


async def test_what_a_store_has_is_said_with_what_it_was_captured_from_and_why_not_is_a_reason(world: World, tmp_path: Path) -> None:
    """By a folder. What the caller has to tell apart: it is not there, the folder is not, nobody trusts it."""
    (tmp_path / "store").mkdir()
    url = f"file://{tmp_path}/store"
    template = TemplateRecord(hash="a1b2", contents="c3d4")
    snapshot = publish(world.node.store, b"a" * 4096, template=template, gpus={"one": 5, "two": 7})
    plain = publish(world.node.store, b"a" * 4096, "plain")
    for at, each in enumerate((snapshot, plain)):
        request = pb.PushRequest(request_id=f"push-{at}", snapshot=reference(each), store=url)
        assert [update async for update in world.stub.Push(request)][-1].HasField("result")

    def find(name: str, where: str) -> Any:
        wanted = pb.SnapshotRef(namespace="default", name=name)
        return world.stub.Find(pb.FindRequest(request_id=f"find {name} {where}", snapshot=wanted, store=where))

    found = await find("small", url)
    assert found.snapshot == reference(snapshot)
    assert (found.template_hash, found.contents_hash) == ("a1b2", "c3d4")
    assert (found.image_bytes, found.weights_bytes, found.gpu_bytes) == (snapshot.manifest.image_bytes, 0, [7, 5])
    found = await find("plain", url)
    assert (found.snapshot.digest, found.template_hash, found.contents_hash) == (plain.digest, "", "")
    assert (await refused(find("none", url)))[2] == "not-in-store"
    assert (await refused(find("small", f"{url}-nowhere")))[2] == "unreachable"
    (signing,) = (world.node.store.keyring.signing,)
    public = world.node.store.keyring.public_file(signing)
    assert public is not None
    (world.node.store.keyring.folder / "revoked").mkdir(exist_ok=True)
    (world.node.store.keyring.folder / "revoked" / "own.pem").write_bytes(public.read_bytes())
    assert (await refused(world.stub.Find(pb.FindRequest(request_id="again", snapshot=found.snapshot, store=url))))[2] in (
        "untrusted",
        "invalid",
    )


async def test_waking_says_what_is_there_and_what_the_caller_can_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text, _ = await refused(world.stub.Wake(pb.WakeRequest(request_id="1", replica_id="one")))
    assert (code, text) == (grpc.StatusCode.NOT_FOUND, "no replica one on this node; it has ended or never was")

    async def no_room(replica_id: str, activation: str) -> Any:
        raise NoRoomToWake(f"replica {replica_id} sleeps on: its GPU is full")

    monkeypatch.setattr(world.node, "wake", no_room)
    code, text, _ = await refused(world.stub.Wake(pb.WakeRequest(request_id="2", replica_id="one")))
    assert (code, text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "replica one sleeps on: its GPU is full")
