"""The forecast beside a ledger: what feeds it, when it is judged, and what a restart leaves of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scaler.books.demand import NOTHING, Elsewhere
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.forecast.forecast import STATEMENT_SECONDS
from scaler.programs.forecasting import Forecasting
from tests.worlds.virtual_time import LoopClock, StandingClock, run
from tests.worlds.waiting import until
from zerowake_shared.background import beside
from zerowake_shared.clock import Clock

BEGIN = 1_800_000_000.0


@asynccontextmanager
async def running(ledger: Ledger, clock: Clock, file: Path | None = None) -> AsyncIterator[Forecasting]:
    forecasting = Forecasting(ledger, file, clock)
    async with beside(forecasting.run(), "forecast"):
        yield forecasting


def chance(forecasting: Forecasting, clock: Clock, model: str = "chat") -> float:
    return forecasting.forecast.chances(clock.wall(), STATEMENT_SECONDS)[model]


def test_requests_feed_it_and_minutes_judge_it() -> None:
    async def life() -> None:
        ledger, clock = Ledger({"chat": ModelLimits(), "mail": ModelLimits()}), LoopClock(asyncio.get_running_loop())
        async with running(ledger, clock) as forecasting:
            before = chance(forecasting, clock)
            for _ in range(100):
                await asyncio.sleep(200.0)
                ledger.start("chat")
                await asyncio.sleep(5.0)
                ledger.end("chat")
            assert chance(forecasting, clock) < before / 2, "nobody has come within a minute"
            await asyncio.sleep(190.0)
            assert chance(forecasting, clock) > 0.2
            score = forecasting.forecast.score
            assert score.statements == pytest.approx(2 * 20_500 / 60.5, rel=0.05), "each minute, but for those that begin in a request"
            assert score.requests == pytest.approx(100, abs=5)
            ledger.hold("chat", 0)
            assert chance(forecasting, clock) == 1.0

    run(life())


def test_silence_of_a_source_is_neither_a_request_nor_the_end_of_one() -> None:
    ledger, clock = Ledger({"chat": ModelLimits()}), StandingClock(BEGIN)
    forecasting = Forecasting(ledger, None, clock)
    clock.moment = BEGIN + 7200.0
    before = chance(forecasting, clock)
    ledger.set_elsewhere("chat", Elsewhere(unknown="redis says nothing"))
    assert chance(forecasting, clock) == before
    ledger.set_elsewhere("chat", NOTHING)
    assert chance(forecasting, clock) == before, "it has been idle for two hours all the same"
    ledger.set_elsewhere("chat", Elsewhere(pending=1))
    assert chance(forecasting, clock) == 1.0
    ledger.set_elsewhere("chat", NOTHING)
    assert before != chance(forecasting, clock) < 1.0


def test_models_come_and_go_with_the_ledger() -> None:
    ledger, clock = Ledger({"chat": ModelLimits()}), StandingClock(BEGIN)
    ledger.add_remote("mail", 0, 1)
    forecasting = Forecasting(ledger, None, clock)
    assert forecasting.forecast.models == ["chat"]
    ledger.declare("mail", ModelLimits())
    assert chance(forecasting, clock, "mail") == 1.0, "another gateway has had a request for it already"
    ledger.withdraw("chat")
    assert forecasting.forecast.models == ["mail"]
    ledger.add_remote("mail", 0, -1)
    assert chance(forecasting, clock, "mail") < 1.0


def test_when_models_are_likely_to_be_asked_for_is_worked_out_now_and_then() -> None:
    ledger, clock = Ledger({"chat": ModelLimits()}), StandingClock(BEGIN)
    forecasting = Forecasting(ledger, None, clock)
    before = forecasting.next_likely()["chat"]
    ledger.start("chat")
    assert forecasting.next_likely()["chat"] == before
    clock.moment += 10.0
    assert forecasting.next_likely()["chat"] == 0.0


async def test_a_restart_knows_what_was_learned_and_forgets_models_that_are_gone(tmp_path: Path) -> None:
    ledger, clock = Ledger({"chat": ModelLimits(), "gone": ModelLimits()}), StandingClock(BEGIN)
    async with running(ledger, clock, tmp_path / "forecast") as forecasting:
        for _ in range(50):
            clock.moment += 100.0
            ledger.start("chat")
            clock.moment += 1.0
            ledger.end("chat")
            forecasting.forecast.judge(clock.wall())
        await asyncio.sleep(0)  # it has begun
        expected, score = chance(forecasting, clock), forecasting.forecast.score
        assert score.statements > 50
    async with running(Ledger({"chat": ModelLimits(), "new": ModelLimits()}), clock, tmp_path / "forecast") as again:
        assert chance(again, clock) == pytest.approx(expected, rel=0.1), "but for what the other one has told of all"
        assert again.forecast.score == score
        assert again.forecast.models == ["chat", "new"]
    async with running(Ledger({"chat": ModelLimits()}), clock) as anew:
        assert chance(anew, clock) > 4 * expected


async def test_what_was_learned_is_kept_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.programs.forecasting._PAUSE_SECONDS", 0.001)
    async with running(Ledger({"chat": ModelLimits()}), StandingClock(BEGIN), tmp_path / "forecast"):
        await until((tmp_path / "forecast").exists, "the forecast is kept")


async def test_a_disk_that_refuses_is_told_and_the_forecast_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("scaler.programs.forecasting._PAUSE_SECONDS", 0.001)
    clock = StandingClock(BEGIN)
    async with running(Ledger({"chat": ModelLimits()}), clock, tmp_path / "nowhere" / "forecast") as forecasting:
        await until(lambda: bool(caplog.records), "it is told")
        clock.moment += 60.0
        await until(lambda: forecasting.forecast.score.statements > 0, "it is judged")
    assert f"cannot be kept in {tmp_path / 'nowhere' / 'forecast'}" in caplog.records[0].message
