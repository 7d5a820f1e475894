"""What snapshots may take of a node's disk: which goes for one that comes, by real pulls from a store in a folder."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from zerowake_proto import agent_pb2

from restore_agent.sequences import disk_budget
from restore_agent.sequences.disk_budget import DiskBudget
from restore_agent.sequences.travel import Travel
from restore_agent.snapshots.catalog import Catalog, NotFound, Snapshot
from restore_agent.snapshots.disk_usage import bytes_below
from restore_agent.snapshots.pins import Pin
from restore_agent.snapshots.store import Store
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.source import Full
from tests.worlds.agent import engine, running
from tests.worlds.snapshots import publish
from tests.worlds.travelling import node

MIB = 1 << 20


def _ignored(progress: Progress) -> None:
    """Nobody looks at it."""


class World:
    """A node with 12 MiB for snapshots, and a store that has three of 5 MiB each."""

    def __init__(self, origin: Store, store: Store, folder: Path) -> None:
        self.origin, self.store, self.url = origin, store, f"file://{folder}"
        self.used: set[str] = set()
        self.removed: list[str] = []
        self.travel = Travel(store, lambda snapshot: None)
        self.budget = DiskBudget(store, lambda total: 12 * MIB, self.used.__contains__, self.travel.stands_elsewhere, self._remove)
        self.travel.disk = self.budget

    async def _remove(self, snapshot: Snapshot) -> None:
        await asyncio.to_thread(self.store.remove, "default", snapshot.manifest.name, snapshot.digest)
        self.removed.append(snapshot.manifest.name)

    async def push(self, store: Store, name: str) -> None:
        await Travel(store, lambda snapshot: None).push(store.get("default", name), self.url, _ignored)

    async def pull(self, name: str, *, urgent: bool = True) -> Snapshot:
        return await self.travel.pull("default", name, "", [self.url], _ignored, replace=False, urgent=urgent)

    @property
    def there(self) -> list[str]:
        return sorted(link.name for link in self.store.names())


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    (tmp_path / "remote").mkdir()
    with node(tmp_path / "origin") as origin, node(tmp_path / "node", origin) as store:
        world = World(origin, store, tmp_path / "remote")
        for name in ("a", "b", "c"):
            publish(origin, random.Random(name).randbytes(5 * MIB), name)
            await world.push(origin, name)
        yield world


def local(store: Store, name: str) -> Snapshot:
    return publish(store, random.Random(name).randbytes(5 * MIB), name)


async def test_what_is_used_least_and_stands_in_its_store_goes_for_one_that_comes(world: World) -> None:
    a, b = await world.pull("a"), await world.pull("b")
    world.store.uses.used(a.digest)
    await world.pull("c")
    assert (world.there, world.removed) == (["a", "c"], ["b"])
    for name in world.there:
        world.store.verify(world.store.get("default", name))
    assert world.store.origins.of(b.digest) == []
    assert (await world.pull("b")).digest == b.digest, "it is fetched again"
    assert world.there == ["a", "b"]


async def test_what_nobody_waits_for_takes_the_place_of_what_is_worth_less_alone(world: World) -> None:
    a = await world.pull("a")
    await world.pull("b")
    for name in ("a", "b"):
        world.store.uses.used(world.store.get("default", name).digest)
    with pytest.raises(Full) as full:
        await world.pull("c", urgent=False)
    assert world.there == ["a", "b"]
    assert "MiB left of what snapshots may take (--disk), and 5 MiB of snapshot default/c@" in str(full.value)
    assert "of the snapshots there 2 worth as much: remove one (`zerowake snapshot rm`)" in str(full.value)
    for _ in range(5):
        world.store.uses.used(a.digest)
        world.store.uses.used(world.origin.get("default", "c").digest)
    await world.pull("c", urgent=False)
    assert world.there == ["a", "c"]
    with pytest.raises(Full):
        await world.pull("b", urgent=False)


async def test_the_only_copy_never_goes_and_one_that_was_put_into_a_store_may(world: World) -> None:
    await asyncio.to_thread(local, world.store, "here")
    await asyncio.to_thread(local, world.store, "here-too")
    with pytest.raises(Full, match="of the snapshots there 2 in no store that could be asked"):
        await world.pull("a")
    assert world.there == ["here", "here-too"]
    await world.push(world.store, "here")
    await world.pull("a")
    assert world.there == ["a", "here-too"]


@pytest.mark.parametrize("how", ["is away", "has another of that name", "has it withdrawn"])
async def test_what_a_store_has_no_more_is_the_only_copy(world: World, tmp_path: Path, how: str) -> None:
    await world.pull("a")
    await asyncio.to_thread(local, world.store, "here")
    if how == "has another of that name":
        publish(world.origin, random.Random("new").randbytes(MIB), "a", replace=True)
        await world.push(world.origin, "a")
    elif how == "has it withdrawn":
        await Travel(world.origin, lambda snapshot: None).withdraw("default", "a", world.url)
    else:
        (tmp_path / "remote").rename(tmp_path / "other")
    with pytest.raises(Full, match="2 in no store that could be asked"):
        await world.budget.make_room("a snapshot", 5 * MIB)
    assert world.there == ["a", "here"]


@pytest.mark.parametrize("by", ["what lives", "who reads it"])
async def test_what_somebody_uses_stays(world: World, by: str) -> None:
    a, b = await world.pull("a"), await world.pull("b")
    for _ in range(9):
        world.store.uses.used(b.digest)
    if by == "what lives":
        world.used |= {a.digest, b.digest}
        with pytest.raises(Full, match="of the snapshots there 2 used"):
            await world.pull("c")
        world.used.discard(b.digest)
        await world.pull("c")
    else:
        with world.store.hold(a):
            await world.pull("c")
    assert world.there == ["a", "c"], "though it was used less"


async def test_what_is_pinned_stays_and_takes_the_place_of_any_other(world: World) -> None:
    a, b = await world.pull("a"), await world.pull("b")
    for _ in range(9):
        world.store.uses.used(b.digest)
    world.store.pins.put(a.digest, Pin.DISK)
    await world.pull("c")
    assert world.there == ["a", "c"], "though it was used less"
    c = world.store.get("default", "c")
    world.store.pins.put(c.digest, Pin.MEMORY)
    with pytest.raises(Full) as full:
        await world.pull("b")
    both = ", ".join(sorted([str(a), str(c)]))
    assert f"of the snapshots there 2 pinned ({both}): remove one (`zerowake snapshot rm`)" in str(full.value)
    assert "take a pin back (`pin` of a model in zerowake.yaml, or of a ModelSnapshot's spec), or make room" in str(full.value)
    world.store.pins.put(c.digest, None)
    for _ in range(9):
        world.store.uses.used(c.digest)
    world.store.pins.put(b.digest, Pin.DISK)  # as one that is pulled again because its owner wants it
    await world.pull("b", urgent=False)
    assert world.there == ["a", "b"]


async def test_two_that_share_all_their_pages_go_together_or_not_at_all(world: World) -> None:
    content = random.Random("twins").randbytes(5 * MIB)
    for name in ("one", "other"):
        publish(world.origin, content, name)
        await world.push(world.origin, name)
        await world.pull(name)
    one = world.store.get("default", "one")
    await world.pull("a")
    for _ in range(9):
        world.store.uses.used(world.store.get("default", "a").digest)
    world.store.pins.put(one.digest, Pin.DISK)
    await world.pull("b")
    assert world.there == ["b", "one", "other"], "the end of `other` alone would have freed nothing"
    world.store.pins.put(one.digest, None)
    for _ in range(99):
        world.store.uses.used(world.store.get("default", "b").digest)
    await world.pull("c")
    assert world.there == ["b", "c"]
    assert sorted(world.removed) == ["a", "one", "other"]


async def test_one_that_is_used_while_its_store_is_asked_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await world.pull("a"), await world.pull("b")
    world.store.uses.used(b.digest)
    asked: list[str] = []

    async def meanwhile(snapshot: Snapshot) -> bool:
        asked.append(snapshot.digest)
        world.used.add(a.digest)
        return True

    monkeypatch.setattr(world.budget, "_stands_elsewhere", meanwhile)
    await world.pull("c")
    assert (asked, world.there) == ([a.digest, b.digest], ["a", "c"])


async def test_two_at_once_do_not_both_find_the_room(world: World) -> None:
    await asyncio.to_thread(local, world.store, "here")
    done = await asyncio.gather(world.pull("a", urgent=False), world.pull("b", urgent=False), return_exceptions=True)
    assert [type(each) for each in done if isinstance(each, Exception)] == [Full]
    assert len(world.there) == 2


async def test_a_disk_that_others_have_filled_counts_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 12 * MIB + disk_budget._SPARE

    def statvfs(path: Path) -> SimpleNamespace:
        return SimpleNamespace(f_blocks=1 << 40, f_frsize=1, f_bavail=free - bytes_below(path / "chunks"))

    monkeypatch.setattr(disk_budget, "os", SimpleNamespace(statvfs=statvfs))
    world.budget._share = lambda total: total
    await world.pull("a")
    await world.pull("b")
    await world.pull("c")
    assert world.there in (["a", "c"], ["b", "c"])
    free = 0
    with pytest.raises(Full, match="has 0 MiB free, and 5 MiB of a snapshot"):
        await world.budget.make_room("a snapshot", 5 * MIB)


async def test_one_that_is_gone_by_then_is_not_found(world: World) -> None:
    a = await world.pull("a")
    publish(world.store, b"another" * 4096, "a", replace=True)
    with pytest.raises(NotFound, match=r"is \w+ no more"):
        world.store.remove("default", "a", a.digest)
    assert world.there == ["a"]


async def test_room_is_made_on_a_disk_that_others_fill(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.pull("a")
    await world.budget.make_room("a dump", 6 * MIB)
    free = 5 * MIB + disk_budget._SPARE
    monkeypatch.setattr(
        disk_budget, "os", SimpleNamespace(statvfs=lambda path: SimpleNamespace(f_blocks=1 << 40, f_frsize=1, f_bavail=free))
    )
    await world.budget.make_room("a dump", 5 * MIB)
    assert world.there == ["a"]
    await world.budget.make_room("a dump", 6 * MIB)
    assert world.there == []
    with pytest.raises(Full, match=r"has 5 MiB free, and 6 MiB of a dump have to come"):
        await world.budget.make_room("a dump", 6 * MIB)


@pytest.mark.parametrize("name", ["small", "other"])
async def test_a_capture_that_would_pass_it_is_refused_before_its_work_and_what_is_there_stays(
    state: Path, mapped: Path, name: str
) -> None:
    """By what the last of its name took, before an engine is started; else by what the engine holds, before it is dumped."""
    phases: list[str] = []
    async with running(state, "--disk", "1MiB") as agent:
        command = Catalog(state).get("default", "small").manifest.engine.command
        wanted = engine(mapped, 8)
        wanted.command[:] = command
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for update in agent.snapshot_updates(name, wanted, replace=True):
                phases.append(update.progress.phase)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        by = "what the last one took" if name == "small" else "what its engine holds"
        assert f"of snapshot default/{name} ({by}) have to come" in str(refused.value.details())
        assert "MiB left of what snapshots may take (--disk)" in str(refused.value.details())
        assert "of the snapshots there 1 in no store that could be asked" in str(refused.value.details())
        assert (await agent.stage("small")).residency.rung == agent_pb2.RUNG_MEMORY
    assert "dump" not in phases and ("start" in phases) is (name == "other")
    assert list((state / "tmp").iterdir()) == []


async def test_a_capture_has_room_made_for_it_before_its_dump(state: Path, mapped: Path, tmp_path: Path) -> None:
    """Its engine holds more than 73 MiB, most of them zeros."""
    (tmp_path / "remote").mkdir()
    store = Store(state)
    ballast = publish(store, random.Random("ballast").randbytes(60 * MIB), "ballast")
    await Travel(store, lambda snapshot: None).push(ballast, f"file://{tmp_path / 'remote'}", _ignored)
    store.close()
    gone_at: list[str] = []
    async with running(state, "--disk", f"{bytes_below(state / 'chunks') + 70 * MIB}") as agent:
        async for update in agent.snapshot_updates("other", engine(mapped, 9)):
            if not Catalog(state).named("default", "ballast"):
                gone_at.append(update.progress.phase)
        assert {link.name for link in Catalog(state).names()} == {"small", "other"}
    assert gone_at[0] == "dump"
