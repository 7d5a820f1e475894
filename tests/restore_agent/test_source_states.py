"""How fast sources give, whoever reads from them, and which do not: measured while they are read, and bounded in number."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import pytest

from restore_agent.transfer.layout import chunk_key
from restore_agent.transfer.source import Absent, Altered, Denied, Source, Unreachable
from restore_agent.transfer.source_states import SourceStates
from tests.worlds.faulty_source import FaultySource, chunk_of
from tests.worlds.virtual_time import StandingClock

MIB = 1 << 20
DATA = bytes(4 * MIB)
KEY = chunk_key(chunk_of(DATA).hash)


class World:
    def __init__(self) -> None:
        self.clock = StandingClock()
        self.states = SourceStates(self.clock)

    def rates(self) -> dict[str, float]:
        return {each.name: each.bandwidth.rate for each in self.states}

    def faults(self) -> dict[str, str]:
        return {each.name: each.fault for each in self.states}


@pytest.fixture
def world() -> World:
    return World()


def reading(source: Source) -> AsyncGenerator[object, None]:
    return source.read(KEY, 0, len(DATA))


async def test_a_rate_is_of_all_streams_together_and_not_of_the_time_between(world: World) -> None:
    source = world.states.measured(FaultySource("s3://b", [DATA], piece=MIB), "store")
    assert str(source) == "s3://b"
    async with contextlib.aclosing(reading(source)) as one, contextlib.aclosing(reading(source)) as other:
        for stream in (one, other, one, other):
            await anext(stream)
        world.clock.moment += 0.5
    assert world.rates() == {"s3://b": 8 * MIB}, "four pieces in half a second"
    world.clock.moment += 1000.0
    async with contextlib.aclosing(reading(source)) as one:
        for _ in range(4):
            await anext(one)
        world.clock.moment += 0.5
    assert world.rates() == {"s3://b": pytest.approx(8 * MIB)}


async def test_one_that_is_read_for_long_is_measured_meanwhile_and_little_is_not_measured(world: World) -> None:
    source = world.states.measured(FaultySource("s3://b", [DATA], piece=1000), "store")
    async with contextlib.aclosing(reading(source)) as stream:
        await anext(stream)
        world.clock.moment += 0.2
    assert world.rates() == {"s3://b": 0.0}, "that was the way there and back"
    async with contextlib.aclosing(reading(source)) as stream:
        await anext(stream)
        world.clock.moment += 2.0
        await anext(stream)
        assert world.rates() == {"s3://b": 1000.0}, "it is slow indeed"


async def test_one_that_gives_nothing_is_named_with_what_it_did_until_it_gives(world: World) -> None:
    source = world.states.measured(FaultySource("s3://b", [DATA], piece=MIB), "store")
    for error in (Unreachable("nobody answers"), Denied("403 Forbidden"), Altered("other bytes")):
        world.states.failed(source, error)
        assert world.faults() == {"s3://b": str(error)}
    world.states.failed(source, Absent("it has no such chunk"))
    assert world.faults() == {"s3://b": "other bytes"}, "not to have something is no fault"
    async with contextlib.aclosing(reading(source)) as stream:
        await anext(stream)
    assert world.faults() == {"s3://b": ""}
    world.states.failed(source, Denied("x" * 10_000))
    assert len(world.faults()["s3://b"]) == 300


async def test_those_that_were_read_last_are_kept_and_those_that_are_read(world: World) -> None:
    kept = world.states.measured(FaultySource("agent 10.0.0.1:1", [DATA], piece=MIB), "agent")
    async with contextlib.aclosing(reading(kept)) as stream:
        await anext(stream)
        for number in range(2, 100):
            world.states.failed(FaultySource(f"agent 10.0.0.{number}:1"), Unreachable("it is gone"))
        names = list(world.rates())
        assert len(names) == 32 and "agent 10.0.0.1:1" in names and "agent 10.0.0.99:1" in names
    world.states.failed(FaultySource("agent 10.0.1.1:1"), Unreachable("it is gone"))
    assert "agent 10.0.0.1:1" not in world.rates()


async def test_bytes_are_counted_by_the_kind_of_their_source(world: World) -> None:
    assert world.states.bytes == {"store": 0, "agent": 0}
    for name, kind in (("s3://b", "store"), ("agent 10.0.0.1:1", "agent"), ("agent 10.0.0.2:1", "agent")):
        source = world.states.measured(FaultySource(name, [DATA], piece=MIB), kind)
        async for _ in source.read(KEY, 0, len(DATA)):
            pass
    assert world.states.bytes == {"store": len(DATA), "agent": 2 * len(DATA)}
