"""A model that cannot start keeps nobody waiting, and is found out when it can."""

import asyncio

import pytest

from scaler.gateway import failed_starts
from scaler.gateway.failed_starts import PAUSE_SECONDS, SECONDS, STARTS, CannotStart, FailedStarts
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front


def test_several_in_a_row_for_a_while_are_hopeless() -> None:
    starts = FailedStarts()
    for at in (0.0, 1.0, SECONDS - 0.1):
        starts.failed("m", "first", at)
        assert not starts.hopeless("m")
    starts.failed("m", "no weights", SECONDS)
    assert "4 tries in 10 s failed, the last one: no weights" in starts.hopeless("m")
    assert not starts.hopeless("other")
    for at, tried in ((SECONDS + PAUSE_SECONDS - 0.1, False), (SECONDS + PAUSE_SECONDS, True)):
        with pytest.raises(CannotStart):
            starts.check("m", at, tried=tried)
    starts.check("m", SECONDS + PAUSE_SECONDS, tried=False)
    starts.forget("m")
    assert not starts.hopeless("m")


def test_few_that_take_long_are_not() -> None:
    starts = FailedStarts()
    for at in range(STARTS - 1):
        starts.failed("m", "x", at * 600.0)
    assert not starts.hopeless("m")


async def test_its_requests_are_refused_at_once_but_for_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_starts, "SECONDS", 0.0)
    monkeypatch.setattr(failed_starts, "PAUSE_SECONDS", 0.0)
    async with Engine() as engine, front() as f, asyncio.timeout(20):
        waiting = [f.ask(f"n{i}") for i in range(3)]
        await f.held(3)
        for _ in range(STARTS):
            f.dispatcher.start_failed("m", "no weights here")
        for answer in await asyncio.gather(*waiting):
            assert (answer.status, answer.error["code"]) == (503, "cannot_start")
            assert "no weights here" in answer.error["message"]
            assert "Retry-After" in answer.headers
        first: list[str] = []
        f.ledger.on_first_demand(first.append)
        trial = f.ask("trial")
        await f.held(1)
        assert first == ["m"]  # somebody asks for another start
        assert (await f.ask("refused")).error["code"] == "cannot_start"
        f.dispatcher.start_failed("m", "still none")
        assert "still none" in (await trial).error["message"]
        lucky = f.ask("lucky")
        await f.held(1)
        f.dispatcher.add(engine.replica())
        assert (await lucky).text == "lucky"
        f.dispatcher.remove("r1")
        asked = f.ask("as ever")
        await f.held(1)
        f.dispatcher.start_failed("m", "one failure is none")
        f.dispatcher.add(engine.replica())
        assert (await asked).text == "as ever"


async def test_right_after_a_failure_none_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_starts, "SECONDS", 0.0)
    async with front() as f:
        for _ in range(STARTS):
            f.dispatcher.start_failed("m", "no weights here")
        assert (await f.ask()).error["code"] == "cannot_start"
        f.ledger.declare("m", f.ledger.limits("m"))  # by its owner, anew
        asked = f.ask()
        await f.held(1)
        asked.cancel()
