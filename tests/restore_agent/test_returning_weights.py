"""Weights that have left memory come back, by a real gpumem, into room that nobody has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gpumem.client.control import Control
from restore_agent.drivers.headroom import Headroom
from restore_agent.drivers.weights import Weights as Lent
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.sequences import returning_weights as module
from restore_agent.sequences.node import Node
from restore_agent.sequences.returning_weights import ReturningWeights
from restore_agent.sequences.staging import Staging
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.manifest import PartRecord, WeightsRecord, layout_file
from restore_agent.snapshots.store import Store
from tests.worlds.gpumem_server import MIB, Served, Weights, make_weights, served
from tests.worlds.snapshots import CRIU, draft
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until

SIZE = 16 * MIB


class World:
    """Snapshots in memory whose weights gpumem lends, and what brings them back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "state")
        self.headroom = Headroom()
        self.staging = Staging(self.store, folder / "memory", CRIU, None, self.headroom, lambda _: None)
        self.lent = Lent(folder / "server" / "gpumem.sock")
        self.clock = StandingClock()
        self.asleep: list[Snapshot] = []
        self.returning = ReturningWeights(self.staging, self.lent, lambda: self.asleep, lambda: (), self.lent.view.look, self.clock)
        self.files: dict[str, Weights] = {}

    async def stands(self, name: str) -> Snapshot:
        """A snapshot of that name in memory, without its weights."""
        snapshot, self.files[name] = lending(self.store, self.folder, name)
        await self.staging.stage(snapshot)
        return snapshot

    async def looks(self, seconds: float = 0.0) -> None:
        """After so long."""
        self.clock.moment += seconds
        await self.lent.view.look()
        await self.returning.look()

    def rung(self, snapshot: Snapshot) -> WeightsRung:
        return self.lent.view.rung(snapshot.manifest.weights)

    async def evict(self, name: str, device: str = "host") -> None:
        async with Control.connected(self.lent.socket) as control:
            await control.evict(self.files[name].ref(device))


def lending(store: Store, folder: Path, name: str) -> tuple[Snapshot, Weights]:
    """A snapshot in a store, with weights in a file beside it."""
    made = make_weights(folder / f"{name}.bin", SIZE)
    part = PartRecord(path=made.path.name, offset=made.offset, first_chunk=0, chunks=made.chunks)
    record = WeightsRecord(region=made.id.hex(), size=SIZE, parts=(part,), folder=str(folder))
    workspace = store.workspace()
    layout = workspace / layout_file(record)
    layout.parent.mkdir(parents=True)
    layout.write_bytes(made.layout)
    with store.chunks.lease() as lease:
        content = random.Random(name).randbytes(8192)
        manifest = draft(lease, workspace, content, name, weights=(record,))
        return store.publish(workspace, manifest, lease, replace=False), made


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.staging.close()
    await world.headroom.close()
    world.store.close()


@contextlib.contextmanager
def gpumem(world: World, reserve: int = 64 * MIB, arena: int = 0) -> Iterator[Served]:
    with served(world.folder / "server", reserve, arena) as server:
        yield server


async def test_they_come_back_once_they_have_been_away_for_a_while(world: World) -> None:
    with gpumem(world):
        small = await world.stands("small")
        await world.looks()
        await world.looks(9.0)
        assert world.rung(small) is WeightsRung.DISK
        await world.looks(1.0)
        assert world.rung(small) is WeightsRung.GPU
    with gpumem(world):
        await world.looks()
        assert world.rung(small) is WeightsRung.DISK, "gpumem was started anew"
        await world.looks(19.0)
        assert world.rung(small) is WeightsRung.DISK, "they left once before"
        await world.looks(1.0)
        assert world.rung(small) is WeightsRung.GPU


async def test_they_come_into_the_arena_where_the_pool_has_no_room(world: World) -> None:
    with gpumem(world, reserve=8 * MIB, arena=32 * MIB):
        small = await world.stands("small")
        await world.looks()
        await world.looks(10.0)
        assert world.rung(small) is WeightsRung.MEMORY


async def test_nobodys_weights_leave_for_them_and_those_used_most_come_first(world: World) -> None:
    with gpumem(world, reserve=24 * MIB) as server:
        small, used = await world.stands("small"), await world.stands("used")
        world.staging.used(used)
        await world.looks()
        for _ in range(3):
            await world.looks(10.0)
        assert (world.rung(small), world.rung(used)) == (WeightsRung.DISK, WeightsRung.GPU)
        (region,) = server.status().regions
        assert region.id == world.files["used"].id
        await world.evict("used")
        await until(lambda: server.host.free_bytes == 24 * MIB)  # made anew, since what was lent is never lent again
        await world.looks()
        await world.looks(20.0)
        assert (world.rung(small), world.rung(used)) == (WeightsRung.DISK, WeightsRung.GPU)


async def test_a_replica_that_is_made_stops_it_and_what_has_come_stays(world: World) -> None:
    with gpumem(world, reserve=SIZE) as server:
        small = await world.stands("small")
        await world.looks()
        os.kill(server.filler(), signal.SIGSTOP)  # so that the fill is certainly under way
        looking = asyncio.create_task(world.looks(10.0))
        await until(lambda: bool(server.status().fills))
        world.returning.give_way(but=small.digest)
        await asyncio.wait([looking], timeout=0.1)
        assert not looking.done(), "the replica is made of it"
        world.returning.give_way()
        await looking
        os.kill(server.filler(), signal.SIGCONT)
        await until(lambda: not server.status().fills)
        assert world.rung(small) is WeightsRung.DISK
        came = [region.filled_bytes for region in server.status().regions]
        await world.looks()
        assert world.rung(small) is WeightsRung.GPU and came in ([], [SIZE]), "at once: it was due, and its own region is its room"


async def test_those_of_a_replica_that_sleeps_come_back(world: World) -> None:
    with gpumem(world):
        asleep, world.files["asleep"] = lending(world.store, world.folder, "asleep")
        world.asleep.append(asleep)
        await world.looks()
        await world.looks(10.0)
        assert world.rung(asleep) is WeightsRung.GPU


async def test_where_others_have_all_the_room_it_is_tried_again_later(world: World) -> None:
    with gpumem(world, reserve=24 * MIB) as server:
        small = await world.stands("small")
        await world.looks()
        async with Control.connected(server.socket) as control:
            other = make_weights(world.folder / "other", SIZE)
            await control.fill(other.layout, other.sources, "host")
            await world.looks(10.0)
            assert [region.id for region in server.status().regions] == [other.id]
            await control.evict(other.ref())
        await until(lambda: server.host.free_bytes == 24 * MIB)
        await world.looks(29.0)
        assert world.rung(small) is WeightsRung.DISK
        await world.looks(1.0)
        assert world.rung(small) is WeightsRung.GPU


async def test_weights_that_stay_for_long_are_away_for_a_short_time_again(world: World) -> None:
    with gpumem(world):
        small = await world.stands("small")
        await world.looks()
        await world.looks(10.0)
        await world.looks(11.0)
        await world.evict("small")
        await world.looks()
        await world.looks(10.0)
        assert world.rung(small) is WeightsRung.GPU


async def test_weights_that_are_told_to_leave_do_not_come_by_a_fill_that_was_under_way(world: World) -> None:
    with gpumem(world) as server:
        small = await world.stands("small")
        await world.looks()
        os.kill(server.filler(), signal.SIGSTOP)
        looking = asyncio.create_task(world.looks(10.0))
        await until(lambda: bool(server.status().fills))
        world.staging.unstage(small.digest)
        leaving = asyncio.create_task(world.returning.let_go(small))
        await looking
        os.kill(server.filler(), signal.SIGCONT)
        await leaving
        await until(lambda: not server.status().fills)
        assert not server.status().regions and world.rung(small) is WeightsRung.DISK


async def test_files_that_are_gone_are_told_and_nothing_else_is_held_up(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with gpumem(world):
        lost, small = await world.stands("lost"), await world.stands("small")
        world.staging.used(lost)
        world.files["lost"].path.unlink()
        await world.looks()
        await world.looks(10.0)
        assert "the weights of default/lost" in caplog.text and "bring the model there" in caplog.text
        await world.looks()
        assert (world.rung(lost), world.rung(small)) == (WeightsRung.DISK, WeightsRung.GPU)


async def test_they_wait_while_others_come_up(world: World) -> None:
    with gpumem(world) as server:
        small, other = await world.stands("small"), await world.stands("other")
        (region,) = await world.staging.regions(other)
        os.kill(server.filler(), signal.SIGSTOP)
        coming = asyncio.create_task(world.lent.stage(region, of=other))
        await until(lambda: bool(world.lent.on_their_way()))
        await world.looks()
        await world.looks(10.0)
        assert [fill.region for fill in server.status().fills] == [world.files["other"].id]
        os.kill(server.filler(), signal.SIGCONT)
        await coming
        await world.looks()
        await world.looks(10.0)
        assert world.rung(small) is WeightsRung.GPU


async def test_a_node_does_it_by_itself(node: Node, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.0)
    snapshot, _ = lending(node.store, tmp_path, "small")
    await node.staging.stage(snapshot)
    with served(short_folder, 64 * MIB):
        await until(lambda: node.weights.view.rung(snapshot.manifest.weights) is WeightsRung.GPU)
