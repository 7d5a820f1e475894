"""What is pinned on a node: for how long that is known, and what an agent says of it and refuses for it, over gRPC."""

from __future__ import annotations

import random
import secrets
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2

from restore_agent.snapshots.pins import Pin, Pins
from restore_agent.snapshots.store import Store
from tests.worlds.agent import Agent, reference, running
from tests.worlds.snapshots import publish
from tests.worlds.travelling import node

MIB = 1 << 20


def test_a_pin_is_known_to_the_next_agent_until_it_is_taken_back_or_its_snapshot_has_gone(tmp_path: Path) -> None:
    for digest in ("a", "b", "c"):
        (tmp_path / "snapshots" / digest).mkdir(parents=True)
    pins = Pins(tmp_path)
    assert pins.of("a") is None
    for digest, pin in (("a", Pin.DISK), ("b", Pin.MEMORY), ("c", Pin.MEMORY)):
        pins.put(digest, pin)
    pins.put("a", Pin.MEMORY)
    pins.put("b", None)
    pins.put("b", None)
    (tmp_path / "snapshots/c").rmdir()
    for known in (pins, Pins(tmp_path)):
        assert (known.of("a"), known.in_memory("a"), known.of("b")) == (Pin.MEMORY, True, None)
    assert Pins(tmp_path).of("c") is None
    pins.put("a", Pin.DISK)
    assert (Pins(tmp_path).of("a"), Pins(tmp_path).in_memory("a")) == (Pin.DISK, False)


def test_what_cannot_be_written_down_is_not_pinned_and_what_cannot_be_read_pins_nothing(tmp_path: Path) -> None:
    (tmp_path / "snapshots/torn").mkdir(parents=True)
    (tmp_path / "node/pins").mkdir(parents=True)
    (tmp_path / "node/pins/torn").write_bytes(b"mem")
    pins = Pins(tmp_path)
    assert pins.of("torn") is None
    pins._folder = tmp_path / "node/pins/torn"
    with pytest.raises(OSError):
        pins.put("torn", Pin.DISK)
    assert pins.of("torn") is None


def test_a_snapshot_that_is_removed_is_pinned_no_more(tmp_path: Path) -> None:
    with node(tmp_path / "node") as store:
        there = publish(store, b"a" * MIB)
        store.pins.put(there.digest, Pin.MEMORY)
        store.remove("default", "small")
        assert store.pins.of(there.digest) is None
        assert publish(store, b"a" * MIB).digest == there.digest
        assert Pins(store.state).of(there.digest) is None


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """With three snapshots of 4 MiB each, of processes that never were."""
    state = tmp_path / "state"
    store = Store(state)
    for name in ("a", "b", "c"):
        publish(store, random.Random(name).randbytes(4 * MIB), name)
    store.close()
    return state


async def pinned(agent: Agent, name: str, rung: agent_pb2.Rung) -> agent_pb2.Residency:
    request = agent_pb2.PinRequest(request_id=secrets.token_hex(4), snapshot=reference(name), rung=rung)
    return (await agent.stub.Pin(request)).residency


async def test_what_is_pinned_in_memory_stays_there_for_a_request_too_and_after_a_restart(state: Path) -> None:
    async with running(state, "--memory", "9MiB") as agent:
        assert (await pinned(agent, "a", agent_pb2.RUNG_MEMORY)).pinned == agent_pb2.RUNG_MEMORY
        await pinned(agent, "b", agent_pb2.RUNG_MEMORY)
        with pytest.raises(grpc.aio.AioRpcError, match="rung: a snapshot can be pinned to RUNG_DISK and RUNG_MEMORY"):
            await pinned(agent, "a", agent_pb2.RUNG_PARKED)
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await pinned(agent, "nobody", agent_pb2.RUNG_DISK)
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
    async with running(state, "--memory", "9MiB") as agent:
        for name in ("a", "b"):
            assert (await agent.stage(name)).residency.pinned == agent_pb2.RUNG_MEMORY
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.stage("c", urgent=True)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        said = str(refused.value.details())
        assert "of the 9 MiB that staged images may take (--memory), 8 MiB are pinned: default/a@" in said and "default/b@" in said
        assert "take a pin back (`pin` of a model in zerowake.yaml, or of a ModelSnapshot's spec)" in said
        told = agent_pb2.NodeUpdate()
        async for update in agent.stub.Watch(agent_pb2.WatchRequest()):
            if update.synced:
                await pinned(agent, "a", agent_pb2.RUNG_ABSENT)
            if update.residency.snapshot.name == "a" and update.residency.pinned == agent_pb2.RUNG_ABSENT:
                told = update
                break
        assert told.residency.rung == agent_pb2.RUNG_MEMORY, "who watches hears of it"
        assert (await agent.stage("c", urgent=True)).residency.rung == agent_pb2.RUNG_MEMORY
        assert [await agent.rung(name) for name in ("a", "b")] == [agent_pb2.RUNG_DISK, agent_pb2.RUNG_MEMORY]
