"""One task a model from its first request on, and what becomes of it at the next one."""

from __future__ import annotations

import asyncio

import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.kubernetes.first_demand import FirstDemand
from tests.worlds.virtual_time import run


class Work:
    """Takes ten seconds; `done` are the models whose work came to its end, and when."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, float]] = []
        self.done: list[tuple[str, float]] = []

    async def __call__(self, model: str) -> None:
        loop = asyncio.get_running_loop()
        self.begun.append((model, loop.time()))
        await asyncio.sleep(10)
        self.done.append((model, loop.time()))


def again(ledger: Ledger, model: str) -> None:
    """Its client leaves, and another comes."""
    ledger.hold(model, 0)
    ledger.leave(model, 0)


@pytest.mark.parametrize(("anew", "done"), [(True, [("a", 14.0), ("b", 14.0)]), (False, [("a", 10.0), ("b", 14.0)])])
def test_each_model_has_one(anew: bool, done: list[tuple[str, float]]) -> None:
    async def story() -> None:
        ledger, work = Ledger({"a": ModelLimits(), "b": ModelLimits()}), Work()
        first = FirstDemand(ledger, work, "work", anew=anew)
        again(ledger, "a")
        await asyncio.sleep(4)
        again(ledger, "a")
        again(ledger, "b")
        await asyncio.sleep(16)
        assert sorted(work.done) == done
        again(ledger, "a")
        await asyncio.sleep(1)
        assert work.begun[-1] == ("a", 20.0), "what has ended is begun again"
        await first.close()
        await asyncio.sleep(60)
        assert sorted(work.done) == done

    run(story())


def test_a_bug_in_one_is_told_and_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        ledger, begun = Ledger({"a": ModelLimits(), "b": ModelLimits()}), []

        async def work(model: str) -> None:
            begun.append(model)
            if model == "a":
                raise ZeroDivisionError("a bug")

        first = FirstDemand(ledger, work, "work", anew=False)
        for model in ("a", "b", "a"):
            again(ledger, model)
            await asyncio.sleep(1)
        assert begun == ["a", "b", "a"]
        assert "work of a: ended by a bug" in caplog.text
        await first.close()

    run(story())
