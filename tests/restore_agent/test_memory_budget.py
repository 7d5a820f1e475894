"""What staged images may take of a node's memory: which goes for another one, and who is refused."""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.errors import reason_of
from restore_agent.sequences import memory_budget
from restore_agent.sequences.memory_budget import GaveWay, NoMemory
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.pins import Pin
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish
from tests.worlds.staging import StagingWorld, slow, staging
from tests.worlds.waiting import until

MIB = 1 << 20


def image(store: Store, name: str, size: int) -> Snapshot:
    """`size`: MiB."""
    return publish(store, random.Random(name).randbytes(size * MIB), name)


@pytest.fixture
async def world(store: Store, tmp_path: Path) -> AsyncIterator[StagingWorld]:
    """With room for 10 MiB."""
    async with staging(store, tmp_path / "memory", lambda total: 10 * MIB) as world:
        yield world


def standing(world: StagingWorld, *snapshots: Snapshot) -> list[str]:
    return [each.manifest.name for each in snapshots if world.staging.in_memory(each.digest)]


async def test_what_is_used_least_goes_for_one_that_a_request_waits_for_and_is_free(store: Store, world: StagingWorld) -> None:
    rare, often, wanted = image(store, "rare", 4), image(store, "often", 4), image(store, "wanted", 5)
    for each in (often, rare):
        await world.staging.stage(each)
        world.staging.used(each)
    for _ in range(100):  # whatever the machine did while the two were read
        world.staging.used(often)
    with world.staging.hold(rare) as staged:
        arena = weakref.ref(await staged.arena)
        directory = staged.directory
    del staged, world.heard[:]
    await world.staging.stage(wanted, urgent=True)
    assert standing(world, rare, often, wanted) == ["often", "wanted"]
    assert world.heard == [rare, wanted], "whoever watches hears of both"
    assert (arena(), directory.exists()) == (None, False)
    assert world.staging.budget.taken_bytes == 9 * MIB


async def test_what_nobody_waits_for_takes_the_place_of_what_is_worth_less_alone(store: Store, world: StagingWorld) -> None:
    there, wanted = image(store, "there", 6), image(store, "wanted", 6)
    await world.staging.stage(there)
    with pytest.raises(NoMemory) as refused:
        await world.staging.stage(wanted)
    assert "wanted@" in str(refused.value)
    assert "needs 6 MiB to stand in memory; 4 MiB are of what staged images may take (--memory)" in str(refused.value)
    assert f"used or worth as much: {there} with 6 MiB: unstage another" in str(refused.value)
    world.staging.used(there)
    for _ in range(100):
        world.staging.used(wanted)
    await world.staging.stage(wanted)
    assert standing(world, there, wanted) == ["wanted"]
    with pytest.raises(NoMemory):
        await world.staging.stage(there)
    assert standing(world, there, wanted) == ["wanted"], "and it is not taken back and forth"


async def test_nothing_goes_where_all_together_would_not_be_enough(store: Store, world: StagingWorld) -> None:
    small, wanted = image(store, "small", 2), image(store, "wanted", 11)
    await world.staging.stage(small)
    with pytest.raises(NoMemory):
        await world.staging.stage(wanted, urgent=True)
    assert standing(world, small) == ["small"]


async def test_two_at_once_do_not_both_find_the_memory_free(store: Store, world: StagingWorld) -> None:
    both = [image(store, name, 6) for name in ("one", "other")]
    done = await asyncio.gather(*(world.staging.stage(each) for each in both), return_exceptions=True)
    assert sorted(type(each) for each in done if isinstance(each, Exception)) == [NoMemory]
    assert len(standing(world, *both)) == 1


async def test_what_is_on_its_way_counts_where_the_machine_has_less_than_the_budget(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel calls available is less only by what was read."""
    first, second = image(store, "first", 6), image(store, "second", 6)
    monkeypatch.setattr(memory_budget, "available_memory", lambda: memory_budget.SPARE_BYTES + 10 * MIB)
    async with staging(store, tmp_path / "memory") as world:
        with slow(store, monkeypatch, first):
            reading = asyncio.create_task(world.staging.stage(first))
            with world.staging.hold(first) as staged:
                await asyncio.shield(staged.arriving)
            with pytest.raises(NoMemory, match=r"needs 6 MiB to stand in memory; 4 MiB are free, and .*first@\w+ with 6 MiB \(used\)"):
                await world.staging.stage(second)
        await reading


@pytest.mark.parametrize("by", ["a restore", "a standby", "another agent"])
async def test_what_somebody_uses_stays(store: Store, world: StagingWorld, by: str) -> None:
    there, wanted = image(store, "there", 6), image(store, "wanted", 6)
    await world.staging.stage(there)

    async def is_refused() -> None:
        with pytest.raises(NoMemory):
            await world.staging.stage(wanted, urgent=True)
        assert standing(world, there) == ["there"]

    if by == "a restore":
        with world.staging.hold(there, urgent=True):
            await is_refused()
    elif by == "a standby":
        world.needed.add(there.digest)
        await is_refused()
        world.needed.clear()
    else:
        assert world.staging.chunk(there.digest, there.chunks[0].hash) is not None
        await is_refused()
        with world.staging.hold(there) as staged:
            staged.given -= 60.0
    await world.staging.stage(wanted, urgent=True)
    assert standing(world, there, wanted) == ["wanted"]


async def test_a_restore_keeps_what_it_reads_though_another_one_wants_the_room(
    store: Store, world: StagingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = image(store, "first", 6), image(store, "second", 6)
    with slow(store, monkeypatch, first), world.staging.hold(first, urgent=True) as staged:
        await asyncio.shield(staged.arriving)
        with pytest.raises(NoMemory):
            await world.staging.stage(second, urgent=True)
    await asyncio.wait_for(asyncio.shield(staged.arena), 60)
    with world.staging.hold(first):
        assert standing(world, second) == []


async def test_what_is_on_its_way_for_nobody_who_waits_gives_way(
    store: Store, world: StagingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, urgent = image(store, "calm", 6), image(store, "urgent", 6)
    with slow(store, monkeypatch, calm) as go:
        reading = asyncio.create_task(world.staging.stage(calm))
        with world.staging.hold(calm) as staged:
            await asyncio.shield(staged.arriving)
        restoring = asyncio.create_task(world.staging.stage(urgent, urgent=True))
        with pytest.raises(GaveWay, match=r"calm@.* was on its way into memory, and a request needs the room") as gave_way:
            await asyncio.wait_for(reading, 60)
        assert reason_of(gave_way.value) == "no-memory"
        await asyncio.wait_for(restoring, 60)
        go.set()
    await until(lambda: world.staging.budget.taken_bytes == 6 * MIB, "what gave way is counted no more")
    assert standing(world, calm, urgent) == ["urgent"]


async def test_one_that_a_restore_joins_on_its_way_gives_way_no_more(
    store: Store, world: StagingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = image(store, "first", 6), image(store, "second", 6)
    with slow(store, monkeypatch, first):
        reading = asyncio.create_task(world.staging.stage(first))
        await until(lambda: world.staging.budget.taken_bytes, "it is on its way")
        with world.staging.hold(first, urgent=True), pytest.raises(NoMemory):
            await world.staging.stage(second, urgent=True)
    await asyncio.wait_for(reading, 60)


async def test_what_is_pinned_stays_and_takes_the_place_of_any_other(store: Store, world: StagingWorld) -> None:
    there, wanted, small = image(store, "there", 6), image(store, "wanted", 6), image(store, "small", 3)
    await world.staging.stage(there)
    for _ in range(100):
        world.staging.used(there)
    store.pins.put(wanted.digest, Pin.MEMORY)
    await world.staging.stage(wanted)
    assert standing(world, there, wanted) == ["wanted"], "nobody waits for it, and it was used less"
    with pytest.raises(NoMemory) as refused:
        await world.staging.stage(there, urgent=True)
    assert f"of the 10 MiB that staged images may take (--memory), 6 MiB are pinned: {wanted} with 6 MiB (pinned): take a pin back" in str(
        refused.value
    )
    await world.staging.stage(small)
    with world.staging.hold(small), pytest.raises(NoMemory, match=r"used, pinned or worth as much: .*\(pinned\), .*\(used\): unstage"):
        await world.staging.stage(image(store, "another", 4), urgent=True)
    store.pins.put(wanted.digest, Pin.DISK)
    await world.staging.stage(there, urgent=True)
    assert standing(world, there, wanted, small) == ["there", "small"]


async def test_what_is_pinned_gives_way_on_its_way_to_nobody(store: Store, world: StagingWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    coming, urgent = image(store, "coming", 6), image(store, "urgent", 6)
    store.pins.put(coming.digest, Pin.MEMORY)
    with slow(store, monkeypatch, coming):
        reading = asyncio.create_task(world.staging.stage(coming))
        await until(lambda: world.staging.budget.taken_bytes, "it is on its way")
        with pytest.raises(NoMemory, match="6 MiB are pinned"):
            await world.staging.stage(urgent, urgent=True)
    await asyncio.wait_for(reading, 60)
