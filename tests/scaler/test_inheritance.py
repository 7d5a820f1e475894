"""What a replica's forecast has learned, taken over by one that is new, over real connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.fleet.addresses import Addresses
from scaler.fleet.inheritance import inherit
from scaler.fleet.peers import Peers
from scaler.programs.forecasting import Forecasting
from tests.worlds.virtual_time import StandingClock

MODELS = ("a", "b")
BORN = 1_800_000_000.0


class Replica:
    def __init__(self, born: float) -> None:
        self.clock = StandingClock(born)
        self.ledger = Ledger({name: ModelLimits() for name in MODELS})
        self.forecasting = Forecasting(self.ledger, clock=self.clock)
        self.peers = Peers(self.ledger, clock=self.clock)
        self.peers.forecast = self.forecasting.told
        self.addresses = Addresses()

    def learn(self, minutes: int) -> None:
        """A request of `a` each ten minutes; `b` is never asked for."""
        for minute in range(minutes):
            if minute % 10 == 0:
                self.ledger.hold("a", 1)
                self.ledger.leave("a", 1)
            self.clock.moment += 60.0
            self.forecasting.forecast.judge(self.clock.wall())

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        async with self.peers.serve("127.0.0.1:0") as address, self.peers.follow(self.addresses):
            yield address


@asynccontextmanager
async def inheriting(heir: Replica, *elders: str) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(inherit(heir.peers, heir.forecasting.adopt))
    heir.addresses.set(elders)
    try:
        async with asyncio.timeout(20):
            yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_new_replica_knows_what_the_elder_has_learned() -> None:
    elder, heir = Replica(BORN), Replica(BORN + 600 * 60)
    elder.learn(600)
    async with elder.served() as address, heir.served(), inheriting(heir, address) as task:
        await task
    forecast = heir.forecasting.forecast
    assert forecast.score.statements == elder.forecasting.forecast.score.statements > 500
    chances = forecast.chances(heir.clock.wall(), 600.0)
    assert chances == pytest.approx(elder.forecasting.forecast.chances(elder.clock.wall(), 600.0))
    assert chances["a"] > 0.5


async def test_what_has_demand_here_still_has() -> None:
    elder, heir = Replica(BORN), Replica(BORN + 600 * 60)
    elder.learn(600)
    heir.ledger.hold("b", 1)
    assert await heir.forecasting.adopt(await elder.forecasting.told())
    assert heir.forecasting.forecast.chances(heir.clock.wall(), 600.0)["b"] == 1.0
    heir.ledger.leave("b", 1)
    assert heir.forecasting.forecast.chances(heir.clock.wall(), 600.0)["b"] < 1.0


async def test_of_a_younger_one_nothing_is_taken_and_of_two_elders_the_eldest_is_asked() -> None:
    eldest, elder, heir, younger = (Replica(BORN + minutes * 60) for minutes in (0, 300, 600, 700))
    eldest.learn(600)
    elder.learn(300)
    younger.learn(900)
    async with eldest.served() as one, elder.served() as two, younger.served() as three, heir.served(), inheriting(heir, three) as task:
        while not heir.peers:
            await asyncio.sleep(0.005)
        assert not task.done()
        heir.addresses.set((one, two, three))
        await task
    assert heir.forecasting.forecast.score.statements >= elder.forecasting.forecast.score.statements


async def test_what_is_of_no_use_is_told_and_another_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    spoiled, silent, elder, heir = (Replica(BORN + minutes * 60) for minutes in (0, 1, 2, 600))

    async def nonsense() -> bytes:
        return b"{}\n"

    spoiled.peers.forecast, silent.peers.forecast = nonsense, None
    elder.learn(500)
    async with (
        spoiled.served() as one,
        silent.served() as two,
        elder.served() as three,
        heir.served(),
        inheriting(heir, one, two) as task,
    ):
        while len([each for each in caplog.messages if "the forecast learns by itself" in each]) < 2:
            await asyncio.sleep(0.005)
        assert not task.done()
        heir.addresses.set((one, two, three))
        await task
    said = " ".join(caplog.messages)
    assert "cannot be taken over (it is none: KeyError('forecast'))" in said
    assert "cannot be taken over (this replica has no forecast to tell)" in said
    assert f"what the replica at {three} has learned is taken over" in said
    assert heir.forecasting.forecast.score.statements > 400


async def test_one_that_knows_as_much_keeps_its_own() -> None:
    elder, heir = Replica(BORN), Replica(BORN + 60)
    elder.learn(10)
    heir.learn(200)
    own = heir.forecasting.forecast.score
    async with elder.served() as address, heir.served(), inheriting(heir, address) as task:
        await task
    assert heir.forecasting.forecast.score == own


async def test_models_that_are_not_known_here_are_not_taken_over() -> None:
    elder, heir = Replica(BORN), Replica(BORN + 600 * 60)
    elder.ledger.declare("gone", ModelLimits())
    elder.learn(600)
    heir.ledger.declare("new", ModelLimits())
    assert await heir.forecasting.adopt(await elder.forecasting.told())
    assert sorted(heir.forecasting.forecast.models) == ["a", "b", "new"]
