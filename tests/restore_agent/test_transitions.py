"""What a move between the rungs asks the node's GPUs for, and when it is refused; GPUs and engines are stood in for.

Moves of real engines, without a GPU: test_parked.py; with one: tests/gpu/.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.sequences.gpu_choice import GiveWay, Suspended
from restore_agent.sequences.parked_budget import ParkedBudget
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.placement import HEADROOM, NoGpuMemory
from restore_agent.sequences.standby import Rung
from restore_agent.sequences.transitions import Transitions
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.manifest import ProcessRecord, WeightsRecord
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish
from tests.worlds.stood_standby import ONE, TWO, stood_engine, waiting

GIB = 1 << 30


def published(store: Store, size: int) -> Snapshot:
    return publish(store, b"one" * 8192, "one", gpus={ONE: size}, quiesces=True)


class Driver:
    """In for CUDA: so much is free, and more after each one that gave way."""

    def __init__(self, free: int) -> None:
        self.now = free
        self.taken: list[dict[str, int]] = []

    def gpus(self) -> Any:
        return SimpleNamespace(uuids=(ONE,))

    def free(self) -> dict[str, int]:
        return {ONE: self.now}

    @contextlib.contextmanager
    def promised(self, needed: dict[str, int]) -> Any:
        self.taken.append(needed)
        yield


def transitions(driver: Driver, make_room: GiveWay, give_way: GiveWay) -> Transitions:
    async def resident(manifest: Any) -> dict[str, list[str]]:
        return {}

    stood: Any = driver
    weights: Any = SimpleNamespace(make_room=make_room, resident=resident)
    headroom: Any = SimpleNamespace(give=lambda: None)
    nothing: Any = None
    return Transitions(nothing, nothing, headroom, stood, weights, give_way)


async def no_room(lacking: Mapping[str, int]) -> bool:
    return False


@pytest.mark.parametrize(
    ("pool", "parked", "asks", "found"),
    [
        ([0], [0], [], True),
        ([2], [0], ["gpumem"], True),
        ([0], [2], ["gpumem", "parked"], True),
        ([0, 1], [1], ["gpumem", "parked", "gpumem"], True),
        ([0, 0, 0], [1, 1], ["gpumem", "parked", "gpumem", "parked"], True),
        ([0, 0], [1, 0], ["gpumem", "parked", "gpumem", "parked"], False),
    ],
)
async def test_gpu_memory_that_lacks_is_asked_of_gpumem_and_then_of_parked_ones(
    store: Store, pool: list[int], parked: list[int], asks: list[str], found: bool
) -> None:
    """`pool`, `parked`: GiB that each of their answers sets free."""
    asked: list[str] = []
    driver = Driver(free=4 * GIB if not asks else 2 * GIB)

    async def make_room(lacking: Mapping[str, int]) -> bool:
        asked.append("gpumem")
        driver.now += (given := pool.pop(0)) * GIB
        return bool(given)

    async def give_way(lacking: Mapping[str, int]) -> bool:
        asked.append("parked")
        driver.now += (given := parked.pop(0)) * GIB
        return bool(given)

    snapshot = published(store, 3 * GIB)
    choosing = transitions(driver, make_room, give_way).gpus.chosen(Suspended(snapshot.manifest, snapshot.manifest.gpus, (ONE,), {}))
    with contextlib.nullcontext() if found else pytest.raises(NoGpuMemory):
        async with choosing as pairs:
            assert pairs == {ONE: ONE}
            assert driver.taken == [{ONE: 3 * GIB}]
    assert asked == asks


async def test_a_standby_that_is_parked_asks_nobody_to_give_way(store: Store) -> None:
    async def gives_way(lacking: Mapping[str, int]) -> bool:
        raise AssertionError("one parked engine is not worth another")

    snapshot = published(store, 3 * GIB)
    standby = waiting(snapshot, Rung.STANDBY, snapshot.manifest.gpus)
    with pytest.raises(NoGpuMemory):
        await transitions(Driver(GIB), no_room, gives_way).park(standby, ParkedBudget(lambda total: 4 * GIB, lambda: {ONE: 80 * GIB}, dict))
    assert standby.rung is Rung.STANDBY and not standby.is_closed


async def test_a_process_of_criu_that_is_about_to_end_is_none_of_the_engine(store: Store) -> None:
    """It is there for a moment after a restore, and a demotion may come at once."""
    criu = subprocess.Popen(["sleep", "60"])
    try:
        engine, record = stood_engine(), ProcessRecord(pid=1001, command="engine")
        engine.gpu_places = {}
        engine.place.host_pids = lambda: {1: os.getppid(), 1001: os.getpid(), 2: criu.pid}
        snapshot = publish(store, b"one" * 8192, "one", processes=(record,))
        moving = transitions(Driver(GIB), no_room, no_room)
        moving._cuda = None
        standby = await moving.demote(engine, snapshot, Rung.PARKED)
    finally:
        criu.kill()
        criu.wait()
    assert standby.processes == [os.getpid()]
    standby.check_whole()


class TwoGpus(Driver):
    """The first is full, and nobody gives way."""

    def __init__(self, free: int, of_the_second: int = 10 * GIB) -> None:
        super().__init__(free)
        self._of_the_second = of_the_second

    def gpus(self) -> Any:
        return SimpleNamespace(uuids=(ONE, TWO), link=lambda one, other: "")

    def free(self) -> dict[str, int]:
        return {ONE: 0, TWO: self._of_the_second}


@pytest.mark.parametrize("is_ours", [True, False], ids=["on a machine", "in a pod"])
async def test_one_that_sleeps_in_a_pod_wakes_on_the_pod_s_gpus_alone(store: Store, is_ours: bool) -> None:
    standby = waiting(published(store, GIB), Rung.STANDBY, {ONE: GIB})
    standby.engine.place.is_ours = is_ours  # type: ignore[misc]
    with contextlib.nullcontext() if is_ours else pytest.raises(NoGpuMemory, match="0 MiB are free"):
        async with transitions(TwoGpus(0), no_room, no_room).room_for(standby) as pairs:
            assert pairs[ONE] == TWO


@pytest.mark.parametrize("given_way", [0, 1])
async def test_a_parked_one_wakes_where_there_is_room_for_what_it_let_go_of(store: Store, given_way: int) -> None:
    asked: list[int] = []

    async def give_way(lacking: Mapping[str, int]) -> bool:
        asked.append(lacking[ONE])
        driver.now += given_way * GIB
        return bool(given_way)

    driver = Driver(GIB // 4)
    standby = waiting(published(store, GIB), Rung.STANDBY, {TWO: GIB})
    standby.wake_bytes = {TWO: GIB}
    standby.stands_on({TWO: ONE})
    with contextlib.nullcontext() if given_way else pytest.raises(NoGpuMemory, match=f"832 MiB more of {ONE}, where it is parked"):
        async with transitions(driver, no_room, give_way).room_for(standby) as pairs:
            assert pairs == {ONE: ONE}
            assert driver.taken == [{ONE: GIB}]
    assert asked == [GIB + HEADROOM - GIB // 4]


async def test_a_parked_one_that_let_go_of_nothing_asks_for_no_room(store: Store) -> None:
    standby = waiting(published(store, GIB), Rung.PARKED, {ONE: GIB})
    async with transitions(Driver(0), no_room, no_room).room_for(standby) as pairs:
        assert pairs == {ONE: ONE}


async def test_what_is_said_of_a_gpu_that_it_does_not_have_keeps_no_parked_one_from_its_wake(store: Store) -> None:
    standby = waiting(published(store, GIB), Rung.PARKED, {ONE: GIB})
    standby.wake_bytes = {TWO: GIB}
    async with transitions(Driver(0), no_room, no_room).room_for(standby) as pairs:
        assert pairs == {ONE: ONE}


async def test_a_standby_wakes_where_there_is_room_for_its_resume_and_its_wake(store: Store) -> None:
    standby = waiting(published(store, 2 * GIB), Rung.STANDBY, {ONE: 2 * GIB})
    standby.wake_bytes = {ONE: GIB}
    for free, found in ((4 * GIB, True), (3 * GIB, False)):
        driver = TwoGpus(0, free)
        with contextlib.nullcontext() if found else pytest.raises(NoGpuMemory):
            async with transitions(driver, no_room, no_room).room_for(standby):
                assert driver.taken == [{TWO: 3 * GIB}]


@pytest.mark.parametrize(("rung", "first"), [(WeightsRung.GPU, "woken"), (WeightsRung.MEMORY, "woken"), (WeightsRung.DISK, "weights")])
async def test_an_engine_is_woken_beside_weights_that_are_in_memory_and_after_those_on_disk(
    store: Store, rung: WeightsRung, first: str
) -> None:
    done: list[str] = []
    moves = transitions(Driver(0), no_room, no_room)
    moves._weights.view = SimpleNamespace(rung=lambda records, tenant: rung)  # type: ignore[assignment]
    snapshot = published(store, 0)
    record = WeightsRecord(region="00" * 32, size=1, parts=())
    snapshot = replace(snapshot, manifest=snapshot.manifest.model_copy(update={"weights": (record,)}))
    engine = stood_engine()
    engine.woken = lambda moved: done.append("woken")

    async def renewed() -> None:
        assert sorted(done) == ["weights", "woken"], "no sooner may it serve"
        done.append("renewed")

    engine.renewed = renewed

    async def brought() -> None:
        done.append("weights")

    task = asyncio.create_task(brought())
    await moves.finish(waiting(snapshot, Rung.PARKED, {}, engine), task, {}, Phases())
    assert done == [first, *({"woken", "weights"} - {first}), "renewed"]
