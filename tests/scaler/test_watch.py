"""What counts of sources, and for how long, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from prometheus_client import REGISTRY
from pydantic import ConfigDict

from scaler.books.demand import NOTHING, Elsewhere
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.sources.source import Polled, Reading, SourceError, Surroundings
from scaler.sources.watch import Sources
from tests.worlds.virtual_time import LoopClock


class Spoken:
    """A source that says whatever a test has it say, after as long."""

    def __init__(self) -> None:
        self.says: Reading | Exception = Reading()
        self.takes = 0.0
        self.read_at: list[float] = []
        self.open = False

    async def read(self) -> Reading:
        self.read_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.takes)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def close(self) -> None:
        self.open = False


class SpokenDeclaration(Polled):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    type: Literal["spoken"] = "spoken"
    interval_seconds: float = 1.0
    source: Spoken

    @property
    def says(self) -> str:
        return "what the test says"

    def open(self, model: str, around: Surroundings) -> Spoken:
        self.source.open = True
        return self.source


class World:
    def __init__(self) -> None:
        clock = LoopClock(asyncio.get_running_loop())
        self.ledger = Ledger({"m": ModelLimits()})
        self.sources = Sources(self.ledger, clock)

    @property
    def told(self) -> Elsewhere:
        return self.ledger.demand_anywhere("m").elsewhere


def errors(source: str = "spoken") -> float | None:
    return REGISTRY.get_sample_value("zerowake_source_errors_total", {"model": "m", "source": source})


async def test_a_value_holds_for_its_time_and_is_unknown_then() -> None:
    world, source = World(), Spoken()
    source.says = Reading(3)
    async with world.sources:
        world.sources.declare("m", [SpokenDeclaration(source=source)])
        assert "was not heard of so far" in world.told.unknown, "nothing is known before the first reading"
        await asyncio.sleep(5.5)
        assert world.told == Elsewhere(3)
        assert source.read_at == [0, 1, 2, 3, 4, 5]
        source.says = SourceError("gone")
        await asyncio.sleep(29)  # 34.5
        assert world.told == Elsewhere(3), "through failures the last value counts"
        (state,) = world.sources.states()["m"]
        assert (state.reading, state.age_seconds, state.fault, state.up) == (Reading(3), 29.5, "gone", False)
        await asyncio.sleep(1)  # 35.5
        assert world.told == Elsewhere(
            unknown="source spoken of model m (what the test says) was not heard of lately: gone; replicas stay as they are"
        )
        source.says = Reading(1)
        await asyncio.sleep(5)
        assert world.told == Elsewhere(1)


async def test_a_slow_source_holds_for_three_of_its_intervals() -> None:
    world, source = World(), Spoken()
    source.says = Reading(3)
    async with world.sources:
        world.sources.declare("m", [SpokenDeclaration(source=source, interval_seconds=60)])
        await asyncio.sleep(59)
        source.says = SourceError("gone")
        await asyncio.sleep(120)
        assert world.told == Elsewhere(3)
        await asyncio.sleep(2)
        assert world.told.unknown


async def test_retries_come_soon_and_then_less_often() -> None:
    world, source = World(), Spoken()
    source.says = SourceError("gone")
    async with world.sources:
        world.sources.declare("m", [SpokenDeclaration(source=source)])
        await asyncio.sleep(18)
        assert source.read_at == [0, 0.5, 1.5, 3.5, 7.5, 12.5, 17.5]
        assert errors() == 7
        source.says = Reading()
        await asyncio.sleep(7)
        assert source.read_at[7:] == [22.5, 23.5, 24.5]
    assert errors() is None, "of a source that is no more nothing is counted"


async def test_a_reading_has_a_deadline_and_its_age_is_from_its_beginning() -> None:
    world, source = World(), Spoken()
    source.says, source.takes = Reading(2), 9.0
    async with world.sources:
        world.sources.declare("m", [SpokenDeclaration(source=source)])
        await asyncio.sleep(5)
        source.takes = 1000.0
        await asyncio.sleep(4.5)
        assert (world.told, world.sources.states()["m"][0].age_seconds) == (Elsewhere(2), 9.5)
        await asyncio.sleep(10)  # that of the reading that began at 9
        assert world.sources.states()["m"][0].fault == "no answer within 10 s"
        assert world.told == Elsewhere(2)
        await asyncio.sleep(11)
        assert world.told.unknown


async def test_sources_add_up_and_replicas_are_a_least_number() -> None:
    world = World()
    one, two, hint, late = Spoken(), Spoken(), Spoken(), Spoken()
    one.says, two.says, hint.says, late.says = Reading(2), Reading(3), Reading(replicas=4), SourceError("gone")
    async with world.sources:
        world.sources.declare("m", [SpokenDeclaration(source=each) for each in (one, two, hint)])
        await asyncio.sleep(0.1)
        assert world.told == Elsewhere(5, 4)
        assert [state.name for state in world.sources.states()["m"]] == ["spoken", "spoken-2", "spoken-3"]
        world.sources.declare("m", [SpokenDeclaration(source=each) for each in (one, late)])
        await asyncio.sleep(0.1)
        assert world.told.pending == 2, "what is known counts beside what is not"
        assert "source spoken-2 of model m" in world.told.unknown
        assert (two.open, one.open) == (False, True)
        world.sources.declare("m", [])
        await asyncio.sleep(0.1)
        assert (world.told, one.open, late.open) == (NOTHING, False, False)


async def test_a_source_may_say_when_it_is_to_be_read_again() -> None:
    world, source = World(), Spoken()
    source.says = Reading(replicas=1, again_seconds=600)
    async with world.sources:
        world.sources.declare("m", [SpokenDeclaration(source=source)])
        await asyncio.sleep(599)
        assert (source.read_at, world.told) == ([0], Elsewhere(replicas=1))
        await asyncio.sleep(2)
        assert source.read_at == [0, 600]


async def test_a_bug_in_a_source_is_not_its_end(caplog: pytest.LogCaptureFixture) -> None:
    world, source = World(), Spoken()
    source.says = ZeroDivisionError()
    async with world.sources:
        world.sources.declare("m", [SpokenDeclaration(source=source)])
        await asyncio.sleep(0.1)
        source.says = Reading(1)
        await asyncio.sleep(1)
        assert "ended by a bug" in caplog.text
        assert world.told == Elsewhere(1)
