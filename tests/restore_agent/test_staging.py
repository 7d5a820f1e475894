"""Staging: from the store's disk into memory, once for all who ask, verified on the way, and back when the last of them has let go."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.sequences.memory_budget import NoMemory
from restore_agent.snapshots.catalog import Corrupt, NotFound
from restore_agent.snapshots.compatibility import Incompatible, node_fits
from restore_agent.snapshots.manifest import ChunkRecord
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import CRIU, PID, another_kernel, publish
from tests.worlds.staging import StagingWorld, slow, staging
from tests.worlds.waiting import until
from zerowake_shared.background import ended

CONTENT = random.Random(5).randbytes(9 << 20)


@pytest.fixture
async def world(store: Store, tmp_path: Path) -> AsyncIterator[StagingWorld]:
    async with staging(store, tmp_path / "memory") as world:
        yield world


async def test_a_staged_snapshot_is_its_skeleton_in_a_folder_and_its_pages_in_an_arena(store: Store, world: StagingWorld) -> None:
    snapshot = publish(store, CONTENT)
    assert not world.staging.in_memory(snapshot.digest)
    await world.staging.stage(snapshot)
    assert world.staging.in_memory(snapshot.digest)
    assert world.heard == [snapshot]
    assert world.staging.disk_to_memory.rate > 0
    shutil.rmtree(store.state / "chunks")  # what stands in memory needs no disk
    with world.staging.hold(snapshot) as staged:
        assert ((await staged.skeleton) / "inventory.img").read_bytes() == b"the skeleton of small"
        (run,) = (await staged.arena).runs()
    assert (run.pid, bytes(run.data)) == (PID, CONTENT)


async def test_all_who_ask_at_once_wait_for_one(store: Store, world: StagingWorld) -> None:
    snapshot = publish(store, CONTENT)
    await asyncio.gather(*(world.staging.stage(snapshot) for _ in range(5)))
    assert world.heard == [snapshot]
    await world.staging.stage(snapshot)
    assert world.heard == [snapshot]


async def test_what_came_up_for_a_request_alone_was_found_on_the_disk(store: Store, world: StagingWorld) -> None:
    """Whether it is in memory by the time that its replica is made, or not: who comes first makes no difference."""
    snapshot, ahead = publish(store, CONTENT), publish(store, CONTENT[::-1], "ahead")
    assert world.staging.found(snapshot.digest) == "disk"
    await world.staging.stage(snapshot, urgent=True)
    await world.staging.stage(ahead)
    assert world.staging.in_memory(snapshot.digest)
    assert (world.staging.found(snapshot.digest), world.staging.found(ahead.digest)) == ("disk", "memory")
    world.staging.used(snapshot)
    await world.staging.stage(snapshot, urgent=True)  # of a request that finds it there
    assert world.staging.found(snapshot.digest) == "memory"


async def test_an_unstaged_snapshot_stays_until_its_last_user_has_let_go(store: Store, world: StagingWorld) -> None:
    snapshot = publish(store, CONTENT)
    await world.staging.stage(snapshot)
    with world.staging.hold(snapshot) as staged:
        world.staging.unstage(snapshot.digest)
        assert not world.staging.in_memory(snapshot.digest)
        assert ((await staged.skeleton) / "inventory.img").exists()
    assert not staged.directory.exists()
    assert world.heard == [snapshot, snapshot]
    await world.staging.stage(snapshot)
    assert world.staging.in_memory(snapshot.digest)


@pytest.mark.parametrize("what", ["page", "skeleton", "index"])
async def test_a_byte_that_is_another_is_found_and_the_snapshot_is_unusable_from_then_on(
    store: Store, world: StagingWorld, what: str
) -> None:
    snapshot = publish(store, CONTENT)
    files = {
        "page": store.chunks.path(snapshot.chunks[1].hash),
        "skeleton": snapshot.directory / "images/inventory.img",
        "index": snapshot.directory / "pages.index",
    }
    whole = files[what].read_bytes()
    files[what].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Corrupt):
        await world.staging.stage(snapshot)
    assert "default/small" in world.staging.damaged[snapshot.digest]
    assert not world.staging.in_memory(snapshot.digest)
    files[what].write_bytes(whole)
    await world.staging.stage(snapshot)
    assert world.staging.damaged == {}, "and usable again once it was whole"


async def test_what_does_not_fit_the_node_is_refused_before_anything_is_read(store: Store, world: StagingWorld) -> None:
    fits = node_fits(CRIU, [], None).model_copy(update={"kernel": another_kernel()})
    snapshot = publish(store, CONTENT, fits=fits)
    shutil.rmtree(store.state / "chunks")
    with pytest.raises(Incompatible, match=f"kernel {another_kernel()}"):
        await world.staging.stage(snapshot)
    assert snapshot.digest in world.staging.unusable


async def test_what_the_node_has_no_memory_for_is_refused_and_not_unusable(store: Store, world: StagingWorld) -> None:
    hole = ChunkRecord(hash="0" * 64, size=1 << 43)
    store.chunks.path(hole.hash).parent.mkdir(parents=True)
    store.chunks.path(hole.hash).touch()
    os.truncate(store.chunks.path(hole.hash), hole.size)
    snapshot = publish(store, CONTENT, chunks=(hole,))
    with pytest.raises(NoMemory, match="unstage another"):
        await world.staging.stage(snapshot)
    assert world.staging.unusable == {}


async def test_who_does_not_wait_for_the_pages_has_the_skeleton_first(store: Store, world: StagingWorld) -> None:
    snapshot = publish(store, CONTENT)
    missing = store.chunks.path(snapshot.chunks[-1].hash)
    missing.unlink()
    os.mkfifo(missing)  # a chunk that takes as long as nobody writes it
    with world.staging.hold(snapshot) as staged:
        assert (await asyncio.wait_for(asyncio.shield(staged.skeleton), 20)).is_dir()
        arena = await asyncio.wait_for(asyncio.shield(staged.arriving), 20)
        assert not arena.whole
        with await asyncio.to_thread(missing.open, "wb"), pytest.raises(Corrupt):  # somebody writes it, and it is none
            await asyncio.wait_for(asyncio.shield(staged.arena), 20)


async def test_what_is_being_read_is_read_to_its_end_though_it_is_replaced(
    store: Store, world: StagingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore that has begun needs no second one: the old bytes go when the last has read them, off the disk and out of memory."""
    snapshot = publish(store, CONTENT)
    with world.staging.hold(snapshot) as staged:
        with slow(store, monkeypatch, snapshot):
            reading = asyncio.create_task(world.staging.stage(snapshot))
            await asyncio.wait_for(asyncio.shield(staged.arriving), 20)
            replaced = await asyncio.to_thread(publish, store, CONTENT[::-1], replace=True)
            assert snapshot.directory.exists()
        await asyncio.wait_for(reading, 20)
        assert not world.staging.in_memory(snapshot.digest), "for those who use it already, and nobody else"
        (run,) = (await staged.arena).runs()
        assert bytes(run.data) == CONTENT
    await until(lambda: not snapshot.directory.exists() and not store.postponed, "the old snapshot is gone")
    await until(lambda: not staged.directory.exists() and not world.staging.budget.taken_bytes, "its image, too")
    store.verify(replaced)


async def test_what_was_removed_before_it_was_read_is_not_called_corrupt(store: Store, world: StagingWorld) -> None:
    snapshot = publish(store, CONTENT)
    store.remove("default", "small")
    with pytest.raises(NotFound, match="removed or replaced meanwhile"):
        await world.staging.stage(snapshot)
    assert world.staging.unusable == {}


async def test_closing_ends_what_is_on_its_way(store: Store, world: StagingWorld) -> None:
    snapshot = publish(store, CONTENT)
    reading = asyncio.create_task(world.staging.stage(snapshot))
    await asyncio.sleep(0)
    await world.staging.close()
    await asyncio.wait([reading], timeout=20)
    assert isinstance(reading.exception(), RuntimeError)


async def test_what_nobody_waits_for_any_more_goes_no_further(store: Store, world: StagingWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = publish(store, CONTENT)
    with slow(store, monkeypatch, snapshot) as go:
        first, second = (asyncio.create_task(world.staging.stage(snapshot)) for _ in range(2))
        with world.staging.hold(snapshot) as staged:
            await asyncio.wait_for(asyncio.shield(staged.arriving), 20)
        await ended([first])
        world.staging.give_up(snapshot.digest)
        assert world.heard == [], "another waits for it"
        await ended([second])
        world.staging.give_up(snapshot.digest)
        assert world.heard == [snapshot]
        go.set()
        await until(lambda: not staged.directory.exists() and not world.staging.budget.taken_bytes, "nothing of it is left")
    await world.staging.stage(snapshot)
    world.staging.give_up(snapshot.digest)
    assert world.staging.in_memory(snapshot.digest), "what is there stays"


async def test_one_that_is_wanted_again_while_the_last_is_used_is_another_one(store: Store, world: StagingWorld) -> None:
    snapshot = publish(store, CONTENT)
    with world.staging.hold(snapshot) as staged:
        images = await asyncio.shield(staged.skeleton)
        world.staging.unstage(snapshot.digest)
        await world.staging.stage(snapshot)
        assert (images / "inventory.img").exists()
    assert not images.exists()
    with world.staging.hold(snapshot) as again:
        assert ((await again.skeleton) / "inventory.img").exists()
