"""What other gateways may have in flight while engines are asked, and what of engines' own numbers is left."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from scaler.books.demand import Elsewhere
from scaler.fleet.member import Flights, Hearing, Member
from scaler.gateway.upstream import Endpoint
from scaler.sources.engine_metrics import EngineDeclaration
from scaler.sources.other_gateways import OtherGateways
from scaler.sources.source import Engine, SourceError
from scaler.sources.watch import Sources
from tests.worlds.gateways import MODEL, gateways
from tests.worlds.metrics_engine import metrics_engine, vllm
from tests.worlds.waiting import until


class Heard:
    def __init__(self, **flights: tuple[int, int]) -> None:
        self.says(**flights)
        self.hearing = Hearing.HEARD

    def says(self, **flights: tuple[int, int]) -> None:
        """Of each gateway: in flight, begun."""
        self._flights = {name: Flights(*each) for name, each in flights.items()}

    def members(self) -> list[Member]:
        return [Member("10.0.0.2:9445", "b", 1.0, self.hearing)]

    def flights(self, model: str) -> Mapping[str, Flights]:
        return self._flights


async def most(heard: Heard, **after: tuple[int, int]) -> int:
    tally = OtherGateways(heard, late_seconds=0).tally("m")
    heard.says(**after)
    return await tally.most()


async def test_what_was_there_and_what_began_since() -> None:
    assert await most(Heard()) == 0
    assert await most(Heard(b=(2, 9)), b=(2, 9)) == 2
    assert await most(Heard(b=(2, 9)), b=(0, 9)) == 2, "they may have ended after the engine was asked"
    assert await most(Heard(b=(0, 9)), b=(0, 12)) == 3, "they may have begun before the engine was asked, and ended after it"
    assert await most(Heard(b=(2, 9), c=(1, 1)), b=(1, 10), c=(1, 1)) == 4


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({"b": (1, 1)}, {}, "came or went"),
        ({"b": (1, 1)}, {"b": (1, 1), "c": (0, 0)}, "came or went"),
        ({"b": (1, 0)}, {"b": (1, 0)}, "of another version"),
        ({"b": (0, 7)}, {"b": (1, 1)}, "knows the model anew"),
    ],
)
async def test_what_cannot_be_known(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], why: str) -> None:
    with pytest.raises(SourceError, match=why):
        await most(Heard(**before), **after)


@pytest.mark.parametrize("hearing", [Hearing.SILENT, Hearing.UNASKED])
async def test_one_that_is_not_heard_of_is_named(hearing: Hearing) -> None:
    heard = Heard()
    heard.hearing = hearing
    with pytest.raises(SourceError, match=r"gateway at 10\.0\.0\.2:9445 has in flight is not known"):
        await most(heard)


async def test_of_an_engines_own_number_counts_what_no_gateway_has_there(tmp_path: Path) -> None:
    """Two gateways, which tell each other over real connections; what one of them counts is the same for both."""
    with metrics_engine(tmp_path / "page") as engine:
        async with gateways(2, concurrency=8) as (here, other):

            def engines(model: str) -> list[Engine]:
                return [Engine("r0", Endpoint("127.0.0.1", engine.port), lambda: here.dispatcher.in_flight("r0"))]

            async with Sources(here.ledger, engines=engines, others=OtherGateways(here.peers).tally) as sources:
                sources.declare(MODEL, [EngineDeclaration(type="engine", interval_seconds=0.1)])

                async def says(pending: int) -> None:
                    await until(lambda: here.ledger.demand_anywhere(MODEL).elsewhere == Elsewhere(pending), f"{pending} came past them")

                engine.shows(vllm("1", "4"))
                await says(5)
                here.engines.open.clear()
                asked = [other.ask(), other.ask(), here.ask()]
                await until(lambda: here.ledger.demand_anywhere(MODEL).in_flight == 3, "the other's are told")
                await says(2)
                await until(lambda: here.ledger.demand_anywhere(MODEL).pending == 5, "all of them count once")
                engine.shows(vllm("0", "3"))
                await says(0)
                here.engines.open.set()
                await asyncio.gather(*asked)
                engine.shows(vllm("0", "1"))
                await says(1)


async def test_requests_that_are_over_before_they_are_told_of_are_counted() -> None:
    async with gateways(2, concurrency=8) as (here, other):

        def told() -> Flights:
            return here.peers.flights(MODEL)[other.peers.instance]

        tally = OtherGateways(here.peers).tally(MODEL)
        await asyncio.gather(*(other.ask() for _ in range(20)))
        await until(lambda: told() == Flights(0, 20), "all have ended")
        assert await tally.most() == 20
        assert await OtherGateways(here.peers).tally(MODEL).most() == 0
