"""What moves between the upper rungs, and who gives way: decided over a node whose GPUs and engines are stood in for.

The same with real engines, without a GPU: test_parked.py; with one: tests/gpu/.
"""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.drivers.cuda import CudaError
from restore_agent.engine.engine import EngineError
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.idling import Idling
from restore_agent.sequences.parked_budget import ParkedBudget, ParkedFull
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.placement import NoGpuMemory
from restore_agent.sequences.replicas import Origin, Replica, Replicas
from restore_agent.sequences.rungs import CannotPark, Rungs
from restore_agent.sequences.sleep_notes import SleepNotes
from restore_agent.sequences.standby import Rung, Standby, Standbys
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish
from tests.worlds.stood_standby import ONE, TWO, stood_engine, waiting
from tests.worlds.waiting import until

GIB = 1 << 30


class Stood:
    """In for the restorer and the transitions: it moves nothing, and says what it was asked to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def prepare(self, snapshot: Snapshot) -> Standby:
        self.asked.append(f"prepare {snapshot.manifest.name}")
        return waiting(snapshot, Rung.STANDBY, snapshot.manifest.gpus)

    async def park(self, standby: Standby, budget: ParkedBudget) -> None:
        await self._does("park", standby)
        standby.stands_on({})

    async def unpark(self, standby: Standby) -> None:
        await self._does("unpark", standby)
        standby.rung = Rung.STANDBY

    async def demote(self, engine: Any, snapshot: Snapshot, rung: Rung) -> Standby:
        self.asked.append(f"demote {snapshot.manifest.name} to {rung.value}")
        return waiting(snapshot, rung, engine.gpu_bytes, engine)

    async def _does(self, what: str, standby: Standby) -> None:
        self.asked.append(f"{what} {standby.snapshot.manifest.name}")
        await self.go.wait()
        if self.fails:
            await standby.close()
            raise self.fails


class World:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.restorer = Stood()
        self.pool = {ONE: 0, TWO: 0}  # that gpumem has not lent
        self.changed: list[tuple[str, Rung | None]] = []

        async def ended() -> None:
            """Nobody waits for the room."""

        restorer: Any = self.restorer
        cuda: Any = SimpleNamespace(total=lambda: {ONE: 80 * GIB, TWO: 80 * GIB})
        view: Any = SimpleNamespace(free_bytes=lambda gpu: self.pool[gpu])
        self.standbys = Standbys(self._changed, self.restorer.unpark)
        self.replicas = Replicas(lambda replica: None, ended)
        idling = Idling(restorer, self.replicas, SleepNotes(folder / "sleepers"))
        self.rungs = Rungs(restorer, restorer, self.standbys, self.replicas, self.store, cuda, view, lambda total: 4 * GIB, idling)

    def _changed(self, snapshot: Snapshot) -> None:
        standby = self.standbys.get(snapshot.digest)
        self.changed.append((snapshot.manifest.name, standby.rung if standby else None))

    def snapshot(self, name: str, size: int = GIB, *, quiesces: bool = True) -> Snapshot:
        return publish(self.store, name.encode() * 8192, name, gpus={ONE: size}, quiesces=quiesces)

    def parked(self, name: str, gpu: str = ONE, size: int = GIB, idle: float = 0.0) -> Snapshot:
        snapshot = self.snapshot(name)
        standby = waiting(snapshot, Rung.PARKED, {gpu: size})
        standby.since -= idle
        self.standbys.add(standby, 0.0)
        return snapshot

    def runs(self, snapshot: Snapshot | None, gpu: str = ONE, size: int = GIB) -> Replica:
        return self.replicas.add("m", snapshot, Origin.CAPTURED, stood_engine({gpu: size}), Phases())

    def rung(self, snapshot: Snapshot) -> Rung | None:
        standby = self.standbys.get(snapshot.digest)
        return standby.rung if standby else None


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    world.restorer.go.set()
    await world.standbys.close()
    await world.replicas.close()
    world.store.close()


async def test_the_longest_idle_on_the_gpu_that_lacks_gives_way(world: World) -> None:
    young, old, elsewhere = world.parked("young", idle=5), world.parked("old", idle=60), world.parked("elsewhere", TWO, idle=900)
    assert await world.rungs.give_way({ONE: GIB // 2})
    assert (world.rung(young), world.rung(old), world.rung(elsewhere)) == (Rung.PARKED, Rung.STANDBY, Rung.PARKED)
    assert world.rungs.held() == {ONE: GIB, TWO: GIB}
    assert world.changed[-1] == ("old", Rung.STANDBY)


async def test_nobody_gives_way_where_all_of_them_together_would_not_be_enough(world: World) -> None:
    world.parked("one")
    world.parked("two")
    assert not await world.rungs.give_way({ONE: 3 * GIB, TWO: GIB})
    assert world.restorer.asked == []
    world.pool[ONE] = GIB
    assert await world.rungs.give_way({ONE: 3 * GIB}), "gpumem has the rest"


async def test_two_who_lack_memory_at_once_wait_for_the_same_one(world: World) -> None:
    snapshot = world.parked("one")
    world.restorer.go.clear()
    both = [asyncio.create_task(world.rungs.give_way({ONE: GIB})) for _ in range(2)]
    await until(lambda: world.restorer.asked)
    world.restorer.go.set()
    assert await asyncio.gather(*both) == [True, True]
    assert world.restorer.asked == ["unpark one"]
    assert world.rung(snapshot) is Rung.STANDBY


async def test_one_that_does_not_become_a_standby_is_gone_and_its_memory_is_free_too(world: World) -> None:
    snapshot = world.parked("one")
    world.restorer.fails = RestoreFailed("cuda-failed", "the driver refuses")
    assert await world.rungs.give_way({ONE: GIB})
    assert world.rung(snapshot) is None
    assert world.rungs.held() == {}


async def test_a_gpu_of_others_has_nothing_parked_and_gets_nothing(world: World) -> None:
    here, there = world.parked("here"), world.parked("there", TWO)
    await world.rungs.others_have({ONE})
    assert (world.rung(here), world.rung(there)) == (Rung.STANDBY, Rung.PARKED)
    with pytest.raises(ParkedFull):
        await world.rungs.demote(world.runs(world.snapshot("new")).id, Rung.PARKED, 0.0, 0.0)
    await world.rungs.others_have(set())
    assert await world.rungs.demote(world.runs(world.snapshot("newer")).id, Rung.PARKED, 0.0, 0.0) == ""


async def test_beyond_the_budget_nothing_is_parked_and_everything_stays_where_it_stands(world: World) -> None:
    for name in ("a", "b", "c"):
        world.parked(name, ONE)
        world.parked(f"{name}-too", TWO)
    large, replica = world.snapshot("large", 2 * GIB), world.runs(world.snapshot("idle"), size=2 * GIB)
    with pytest.raises(ParkedFull, match="1024 MiB more"):
        await world.rungs.park(large, 0.0, 0.0)
    with pytest.raises(ParkedFull, match="1024 MiB more"):
        await world.rungs.demote(replica.id, Rung.PARKED, 0.0, 0.0)
    assert (world.rung(large), world.restorer.asked) == (None, []), "not even a standby was made"
    assert world.replicas.get(replica.id) is replica
    await world.rungs.park(world.snapshot("small", GIB), 0.0, 0.0)
    assert world.restorer.asked == ["prepare small", "park small"]


async def test_what_is_parked_at_once_is_counted_together(world: World) -> None:
    replicas = [world.runs(world.snapshot(f"m{number}"), size=2 * GIB) for number in range(3)]
    calls = (world.rungs.demote(replica.id, Rung.PARKED, 0.0, 0.0) for replica in replicas)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers[:2] == ["", ""]
    assert isinstance(answers[2], ParkedFull)
    assert world.rungs.held() == {ONE: 4 * GIB}


async def test_what_cannot_be_parked_is_refused_and_goes_on(world: World) -> None:
    deaf, without = world.runs(world.snapshot("deaf", quiesces=False)), world.runs(None)
    with pytest.raises(CannotPark, match="does not take part in the control directory"):
        await world.rungs.demote(deaf.id, Rung.PARKED, 0.0, 0.0)
    with pytest.raises(CannotPark, match="started without a snapshot"):
        await world.rungs.demote(without.id, Rung.PARKED, 0.0, 0.0)
    assert len(world.replicas) == 2


@pytest.mark.parametrize("cut", ["read", "left"])
async def test_a_replica_that_does_not_become_a_standby_has_ended(world: World, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """Also where its manifest cannot be read for a moment, and where whoever asked for it has gone: it is in no list any more."""
    replica = world.runs(world.snapshot("one"))
    demoting = asyncio.Event()

    async def waits(*_: Any) -> Standby:
        demoting.set()
        await asyncio.Event().wait()
        raise AssertionError

    def unreadable(*_: Any) -> Snapshot:
        raise OSError(errno.EMFILE, "Too many open files")

    if cut == "read":
        monkeypatch.setattr(world.store, "get", unreadable)
        assert "Too many open files" in await world.rungs.demote(replica.id, Rung.STANDBY, 0.0, 0.0)
    else:
        monkeypatch.setattr(world.restorer, "demote", waits)
        asked = asyncio.create_task(world.rungs.demote(replica.id, Rung.STANDBY, 0.0, 0.0))
        await demoting.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    assert replica.engine.place.exit_of(1).done() and not len(world.replicas)


@pytest.mark.parametrize("error", [NoGpuMemory("none is free", {ONE: 1}), CudaError("no driver")])
async def test_a_standby_that_finds_no_gpu_is_a_standby_still(world: World, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def refuses(standby: Standby, budget: ParkedBudget) -> None:
        raise error

    snapshot = world.snapshot("one")
    monkeypatch.setattr(world.restorer, "park", refuses)
    with pytest.raises(type(error)):
        await world.rungs.park(snapshot, 0.0, 0.0)
    assert world.rung(snapshot) is Rung.STANDBY
    assert world.standbys.get(snapshot.digest) is not None


async def test_one_that_cannot_be_parked_any_more_is_gone(world: World) -> None:
    snapshot = world.snapshot("one")
    world.restorer.fails = RestoreFailed("cuda-failed", "the driver refuses")
    with pytest.raises(RestoreFailed):
        await world.rungs.park(snapshot, 0.0, 0.0)
    assert world.rung(snapshot) is None
    assert world.changed[-1] == ("one", None)


async def test_an_engine_that_has_moved_twice_is_told_of_it_as_once(world: World) -> None:
    standby = waiting(world.snapshot("one"), Rung.STANDBY, {ONE: GIB})
    standby.stands_on({ONE: TWO, TWO: ONE})
    assert (standby.gpus, standby.moved) == ({TWO: GIB}, {ONE: TWO, TWO: ONE})
    standby.stands_on({ONE: ONE, TWO: TWO})
    assert standby.moved == {ONE: TWO, TWO: ONE}, "from where it was, it has not moved"
    standby.stands_on({ONE: TWO, TWO: ONE})
    assert (standby.gpus, standby.moved) == ({ONE: GIB}, {ONE: ONE, TWO: TWO}), "and is where its engine knows it to be"
    await standby.close()


async def test_what_a_parked_one_holds_is_said_before_and_while_it_does(world: World) -> None:
    snapshot = world.snapshot("one", GIB)
    assert world.rungs.parked_bytes(snapshot) == [GIB], "what its suspend gave back as it was taken"
    assert world.rungs.parked_bytes(world.snapshot("deaf", quiesces=False)) == []
    assert await world.rungs.demote(world.runs(snapshot, size=GIB + 7).id, Rung.PARKED, 0.0, 0.0) == ""
    assert world.rungs.parked_bytes(snapshot) == [GIB + 7]


# Where an engine of several ranks stands


async def test_where_each_gpu_of_the_snapshot_has_gone_is_known_on_every_rung(world: World) -> None:
    """Restored with its GPUs exchanged, demoted there, and exchanged again at the next wake."""
    snapshot = publish(world.store, b"pair" * 2048, "pair", gpus={ONE: GIB, TWO: 2 * GIB}, quiesces=True)
    standby = waiting(snapshot, Rung.STANDBY, snapshot.manifest.gpus)
    standby.stands_on({ONE: TWO, TWO: ONE})
    assert (standby.places, standby.moved, standby.gpus) == ({ONE: TWO, TWO: ONE}, {ONE: TWO, TWO: ONE}, {TWO: GIB, ONE: 2 * GIB})
    engine = standby.engine
    again = Standby(snapshot, engine, standby.let_go, standby.undo, [], standby.gpus, (ONE, TWO), places=standby.places)
    assert again.moved == {ONE: ONE, TWO: TWO}, "its engine knows by now where it is"
    again.stands_on({ONE: TWO, TWO: ONE})
    assert again.places == {ONE: ONE, TWO: TWO}, "where its weights were lent at first"
    assert again.gpus == {ONE: GIB, TWO: 2 * GIB}


async def test_an_engine_of_which_a_process_has_ended_is_not_whole(world: World) -> None:
    standby = waiting(world.snapshot("one"), Rung.STANDBY, {})
    standby.processes = [os.getpid()]
    standby.check_whole()
    ended = subprocess.Popen(["true"])
    ended.wait()
    standby.processes = [os.getpid(), ended.pid]
    with pytest.raises(EngineError, match=rf"of the 2 processes of an engine that waited, pid {ended.pid} has ended"):
        standby.check_whole()
