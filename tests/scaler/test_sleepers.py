"""Replicas that sleep: which are woken for whom, through the dispatcher that gives requests their places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway import sleepers as module
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint, Hold
from tests.worlds.waiting import until


class World:
    def __init__(self, concurrency: int) -> None:
        self.ledger = Ledger({"m": ModelLimits(concurrency=concurrency)})
        self.dispatcher = Dispatcher(self.ledger)
        self.wanted: list[str] = []
        self.dispatcher.woken_by(lambda backend: self.wanted.append(backend.id))

    def says(self, name: str, *, asleep: bool) -> None:
        self.dispatcher.add(Backend(name, "m", Endpoint("127.0.0.1", 1)), asleep=asleep)

    def asks(self) -> Hold | str:
        """The replica that a request got at once, or its place in the line."""
        member = self.dispatcher.take("m")
        return member.backend.id if member else self.dispatcher.hold("m", "tenant", Priority.NORMAL, 0)


@pytest.fixture(params=[2])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made = World(request.param)
    yield made
    await made.dispatcher.close()


async def got(hold: Hold | str) -> str:
    assert isinstance(hold, Hold)
    async with asyncio.timeout(10):
        return (await hold.future).backend.id


async def test_a_request_has_one_woken_at_once_and_goes_there_when_it_is_awake(world: World) -> None:
    firsts: list[str] = []
    world.ledger.on_first_demand(firsts.append)
    world.says("a", asleep=True)
    world.says("b", asleep=True)
    assert world.dispatcher.ready("m") == [] and world.ledger.demand("m").replicas == 2
    waits = [world.asks(), world.asks()]
    assert world.wanted == ["a"], "one is enough for two"
    assert firsts == ["m"], "its activation is open"
    world.says("a", asleep=True)  # its agent says so again
    third = world.asks()
    assert world.wanted == ["a", "b"]
    world.says("a", asleep=False)
    assert [await got(each) for each in waits] == ["a", "a"]
    world.says("b", asleep=False)
    assert await got(third) == "b"


async def test_where_one_is_awake_another_is_woken_only_when_waiting_does_not_help(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.says("awake", asleep=False)
    world.says("asleep", asleep=True)
    taken = [world.asks(), world.asks()]
    assert taken == ["awake", "awake"]
    short = world.asks()
    member = world.dispatcher._members["awake"]
    world.dispatcher.release(member)
    assert await got(short) == "awake"
    await asyncio.sleep(2 * module.PATIENCE_SECONDS)  # longer than it would have taken
    assert world.wanted == []
    world.asks()
    await until(lambda: world.wanted == ["asleep"])


async def test_one_that_cannot_be_woken_is_tried_after_the_others(world: World) -> None:
    world.says("a", asleep=True)
    world.says("b", asleep=True)
    waits = world.asks()
    world.dispatcher.wake_failed("a")
    assert world.wanted == ["a", "b"], "the next one, at once"
    world.dispatcher.wake_failed("b")
    assert world.wanted == ["a", "b"], "nobody is left"
    world.dispatcher.wake_again("a")
    assert world.wanted == ["a", "b", "a"]
    world.dispatcher.wake_failed("unknown")
    world.dispatcher.wake_again("unknown")
    world.says("a", asleep=False)
    assert await got(waits) == "a"
    world.dispatcher.wake_again("b")
    assert world.wanted == ["a", "b", "a"], "nobody waits any more"


async def test_one_that_falls_asleep_gets_nothing_more_and_keeps_no_place(world: World) -> None:
    world.says("a", asleep=False)
    assert world.asks() == "a"
    member = world.dispatcher._members["a"]
    world.says("a", asleep=True)
    assert (member.asleep, member.takes_requests, member.in_flight) == (True, False, 1)
    assert isinstance(world.asks(), Hold) and world.wanted == ["a"]
    world.dispatcher.retire("a")
    assert isinstance(world.asks(), Hold) and world.wanted == ["a"], "its pod goes: it is not woken for anybody"
    world.dispatcher.remove("a")
    world.says("a", asleep=True)
    assert world.wanted == ["a", "a"], "another of its name"


async def test_a_withdrawn_model_has_nobody_woken(world: World) -> None:
    world.says("a", asleep=True)
    world.ledger.withdraw("m")
    world.dispatcher.wake_again("a")
    assert world.wanted == []
