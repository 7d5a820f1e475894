"""What an agent says of its node to one who listens: all of it, then each change, and how far what is on its way is, now and again."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.sequences.changes import Removed
from restore_agent.sequences.inventory import Gpu
from restore_agent.service.stream import Stream
from restore_agent.snapshots.catalog import Corrupt, Unreadable
from restore_agent.transfer.progress import Progress
from tests.worlds.agent_service import World, reference, served_node
from tests.worlds.snapshots import publish
from tests.worlds.virtual_time import StandingClock

CONTENT = random.Random(5).randbytes(9 << 20)  # three chunks
KEY = ("default", "far")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with served_node(tmp_path) as world:
        yield world
        await world.node.staging.close()
        await world.node.headroom.close()


async def first_part(updates: AsyncIterator[pb.NodeUpdate]) -> list[pb.NodeUpdate]:
    found = []
    async for update in updates:
        if update.synced:
            return found
        found.append(update)
    raise AssertionError("the stream has ended")


async def the_next(updates: AsyncIterator[pb.NodeUpdate], wanted: Callable[[pb.NodeUpdate], Any] = bool) -> pb.NodeUpdate:
    async with asyncio.timeout(30):
        while True:
            update = await anext(updates)
            if wanted(update):
                return update


async def test_a_watch_says_all_that_there_is_and_then_what_changes(world: World) -> None:
    one, two = (publish(world.node.store, name.encode() * 8192, name) for name in ("one", "two"))
    (two.directory / "manifest.json").write_text("torn")
    stream = world.stub.Watch(pb.WatchRequest())
    updates = await first_part(aiter(stream))
    assert updates[0].node.name == "test" and updates[0].node.memory_total_bytes > 0
    assert updates[0].node.HasField("staged_bytes") and not updates[0].node.staged_bytes, "none, and not: not known"
    assert updates[0].node.staged_limit_bytes == updates[0].node.memory_total_bytes, "no other budget was given"
    residencies = {update.residency.snapshot.name: update.residency for update in updates if update.HasField("residency")}
    assert residencies["one"].rung == pb.RUNG_DISK and not residencies["one"].unusable_reason
    assert residencies["two"].unusable_reason
    await world.node.remove(one)
    gone = (await the_next(aiter(stream), lambda update: update.HasField("residency"))).residency
    assert (gone.snapshot.name, gone.rung) == ("one", pb.RUNG_ABSENT)
    assert gone.revision > residencies["two"].revision > residencies["one"].revision > 0, "in the order in which it was said"
    stream.cancel()


async def test_what_changes_in_one_that_is_gone_is_told_as_that_and_in_one_that_was_replaced_not_at_all(world: World) -> None:
    """Its image may come into memory, or a standby of it end, at any time after it was removed."""
    gone, replaced = (publish(world.node.store, name.encode() * 8192, name) for name in ("gone", "replaced"))
    async with aclosing(Stream(world.node).updates()) as updates:
        await first_part(updates)
        await world.node.remove(gone)
        world.node.changes.tell(gone)
        world.node.changes.tell(Unreadable("default", "gone", Corrupt("torn")))
        for _ in range(3):
            told = (await the_next(updates, lambda update: update.HasField("residency"))).residency
            assert (told.snapshot.name, told.rung) == ("gone", pb.RUNG_ABSENT)
        new = publish(world.node.store, b"new" * 8192, "replaced", replace=True)
        world.node.changes.tell(Removed(replaced))
        world.node.changes.tell(replaced)
        world.node.changes.tell(new)
        told = (await the_next(updates, lambda update: update.HasField("residency"))).residency
        assert (told.snapshot.digest, told.rung) == (new.digest, pb.RUNG_DISK)


async def test_what_is_on_its_way_is_told_a_few_times_a_second_and_its_end_before_anything_else(world: World) -> None:
    clock, arriving = StandingClock(), world.node.travel.arriving
    snapshot = publish(world.node.store, b"y" * 8192)
    arriving[KEY] = ("d" * 64, Progress(1, 1, 1000))
    async with aclosing(Stream(world.node, clock).updates()) as updates:
        told = [update.transfer for update in await first_part(updates) if update.HasField("transfer")]
        assert told == [
            pb.Transfer(
                snapshot=pb.SnapshotRef(namespace="default", name="far", digest="d" * 64),
                rung=pb.RUNG_DISK,
                progress=pb.TransferProgress(done_bytes=1, moved_bytes=1, total_bytes=1000),
            )
        ], "whoever comes later hears of it, too"
        for done in range(2, 500):
            arriving[KEY] = ("d" * 64, Progress(done, done, 1000))
            world.node.changes.tell(snapshot)
        changes = [await the_next(updates) for _ in range(2, 500)]
        assert all(update.HasField("residency") for update in changes), "no time has passed, and nothing but changes is told"
        clock.moment += 0.25
        assert (await the_next(updates)).transfer.progress.done_bytes == 499
        clock.moment += 0.25
        world.node.changes.tell(snapshot)
        assert (await the_next(updates)).HasField("residency"), "it has come no further, and is not told"
        del arriving[KEY]
        world.node.changes.tell(snapshot)
        ended = (await the_next(updates)).transfer
        assert ended.snapshot.name == "far" and not ended.HasField("progress")
        assert (await the_next(updates)).HasField("residency")


async def test_the_node_is_told_every_other_second_however_much_else_changes(world: World) -> None:
    clock = StandingClock()
    snapshot = publish(world.node.store, b"y" * 8192)
    async with aclosing(Stream(world.node, clock).updates()) as updates:
        await first_part(updates)
        for _ in range(4):
            world.node.changes.tell(snapshot)
        kinds = [(await the_next(updates)).WhichOneof("update")]
        clock.moment += 2.0
        kinds += [(await the_next(updates)).WhichOneof("update") for _ in range(4)]
    assert kinds == ["residency", "node", "residency", "residency", "residency"]


async def test_a_gpu_that_others_take_is_told_at_once(world: World) -> None:
    clock, gib = StandingClock(), 1 << 30
    gpu = Gpu("GPU-1", "NVIDIA H200", 80 * gib, 70 * gib, 70 * gib, 0, 0)
    world.node.inventory.gpus = [gpu]
    async with aclosing(Stream(world.node, clock).updates()) as updates:
        await first_part(updates)
        world.node.inventory.gpus = [replace(gpu, free_bytes=gpu.free_bytes - gib // 2)]  # as good as what was told
        clock.moment += 0.25
        world.node.changes.tell(publish(world.node.store, b"y" * 8192))
        assert (await the_next(updates)).HasField("residency")
        world.node.inventory.gpus = [replace(gpu, free_bytes=20 * gib)]
        clock.moment += 0.25
        assert [each.free_bytes for each in (await the_next(updates)).node.gpus] == [20 * gib]


async def test_an_image_that_is_staged_is_followed_into_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = publish(world.node.store, CONTENT)
    go, read_into = threading.Event(), world.node.store.chunks.read_into

    def slowly(chunk: Any, target: memoryview) -> None:
        if chunk.hash == snapshot.chunks[-1].hash:
            go.wait(30)
        read_into(chunk, target)

    monkeypatch.setattr(world.node.store.chunks, "read_into", slowly)
    monkeypatch.setattr(world.node.staging, "check_fits", lambda manifest: None)  # this node has no CRIU
    stream = world.stub.Watch(pb.WatchRequest())
    updates = aiter(stream)
    await first_part(updates)
    staging = asyncio.create_task(world.node.staging.stage(snapshot))
    rest = snapshot.chunks[-1].size
    told = (await the_next(updates, lambda update: update.transfer.progress.done_bytes == len(CONTENT) - rest)).transfer
    assert (told.snapshot, told.rung, told.progress.total_bytes) == (reference(snapshot), pb.RUNG_MEMORY, len(CONTENT))
    assert world.node.staging.held_bytes == len(CONTENT)
    go.set()
    await staging
    ended = (await the_next(updates, lambda update: update.HasField("transfer") and not update.transfer.HasField("progress"))).transfer
    assert ended.snapshot == reference(snapshot)
    stands = (await the_next(updates, lambda update: update.HasField("residency"))).residency
    assert stands.rung == pb.RUNG_MEMORY
    stream.cancel()
