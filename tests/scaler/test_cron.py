"""Replicas by the calendar: the very moment, summer time, and what is no calendar. Time is virtual."""

from __future__ import annotations

import asyncio
import datetime
import zoneinfo

import pytest
from pydantic import ValidationError

from scaler.books.demand import Elsewhere
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.sources.cron import CronDeclaration
from scaler.sources.source import Surroundings
from scaler.sources.watch import Sources
from tests.worlds.virtual_time import LoopClock, StandingClock

ZURICH = zoneinfo.ZoneInfo("Europe/Zurich")
OFFICE = CronDeclaration(type="cron", timezone="Europe/Zurich", start="0 8 * * 1-5", end="0 18 * * 1-5", desired=3)


async def replicas(declared: CronDeclaration, *moment: int) -> int:
    """At that moment of the clocks in Zurich."""
    year, month, day, hour = moment
    clock = StandingClock(datetime.datetime(year, month, day, hour, tzinfo=ZURICH).timestamp())
    return (await declared.open("m", Surroundings(clock)).read()).replicas


async def test_it_begins_and_ends_at_the_moment() -> None:
    friday = datetime.datetime(2027, 1, 15, 7, 59, 30, tzinfo=ZURICH)
    ledger = Ledger({"m": ModelLimits()})
    async with Sources(ledger, LoopClock(asyncio.get_running_loop(), friday.timestamp())) as sources:
        sources.declare("m", [OFFICE])
        await asyncio.sleep(29.9)
        assert ledger.demand_anywhere("m").elsewhere == Elsewhere()
        await asyncio.sleep(0.2)
        assert ledger.demand_anywhere("m").elsewhere == Elsewhere(replicas=3)
        assert ledger.demand_anywhere("m").load(8.0) == 24
        await asyncio.sleep(10 * 3600 - 0.2)
        assert ledger.demand_anywhere("m").elsewhere == Elsewhere(replicas=3)
        await asyncio.sleep(0.2)
        assert ledger.demand_anywhere("m").elsewhere == Elsewhere()
        await asyncio.sleep(2.5 * 24 * 3600)
        assert ledger.demand_anywhere("m").elsewhere == Elsewhere(), "Monday is not yet there"
        await asyncio.sleep(4 * 3600)
        assert ledger.demand_anywhere("m").elsewhere == Elsewhere(replicas=3)


async def test_over_midnight_and_over_summer_time() -> None:
    night = CronDeclaration(type="cron", timezone="Europe/Zurich", start="0 22 * * *", end="0 6 * * *", desired=1)
    assert [await replicas(night, 2027, 3, 27, hour) for hour in (21, 22, 23)] == [0, 1, 1]
    assert [await replicas(night, 2027, 3, 28, hour) for hour in (0, 1, 3, 5, 6)] == [1, 1, 1, 1, 0]  # there is no 2 o'clock
    assert [await replicas(night, 2027, 10, 31, hour) for hour in (1, 2, 5, 6)] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"timezone": "Mars/Olympus"}, "'Mars/Olympus' is no time zone that this machine knows"),
        ({"timezone": "../etc/passwd"}, "is no time zone"),
        ({"start": "every day"}, "'every day' is no expression of cron"),
        ({"start": "0 0 31 2 *"}, "is no expression of cron"),
        ({"start": "0 18 * * 1-5"}, "start and end are both '0 18 [*] [*] 1-5'"),
        ({"desired": 0}, "greater than or equal to 1"),
        ({"interval_seconds": 5}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_no_calendar(change: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        CronDeclaration.model_validate(OFFICE.model_dump() | change)
