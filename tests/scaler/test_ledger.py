"""The ledger: counting, edges, and watching without missing or repeating."""

import asyncio

import pytest

from scaler.books import ledger as ledger_module
from scaler.books.activation import Activations
from scaler.books.demand import NOTHING, Demand, Elsewhere, UnknownModel
from scaler.books.ledger import Ledger, QueueFull
from scaler.books.limits import ModelLimits
from tests.worlds.virtual_time import StandingClock


def ledger(**limits: int) -> Ledger:
    return Ledger({"m": ModelLimits(**limits)})


def test_counts() -> None:
    book = ledger()
    book.hold("m", 10)
    book.hold("m", 5)
    assert (book.demand("m"), book.held_bytes("m")) == (Demand(held=2, in_flight=0, replicas=0), 15)
    book.set_replicas("m", ready=1, replicas=2)
    book.hand_over("m", 10)
    assert (book.demand("m"), book.demand("m").pending, book.held_bytes("m")) == (Demand(1, 1, 2), 2, 5)
    book.leave("m", 5)
    book.end("m")
    assert book.demand("m") == Demand(0, 0, 2)


def test_bounds_are_for_new_requests_only() -> None:
    book = ledger(max_requests=2, max_bytes=100)
    book.hold("m", 60)
    with pytest.raises(QueueFull, match="60 bytes are held, 50 more would pass the bound of 100"):
        book.hold("m", 50)
    book.hold("m", 40)
    with pytest.raises(QueueFull, match="2 requests are held, the bound is 2"):
        book.hold("m", 0)
    book.hold("m", 50, bounded=False)
    assert book.demand("m").held == 3


def test_a_flood_of_one_model_refuses_itself_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever floods come, what they hold together stays below the bound, and a model that holds little is let in."""
    monkeypatch.setattr(ledger_module, "TOTAL_REQUESTS", 90)
    monkeypatch.setattr(ledger_module, "TOTAL_BYTES", 900)
    book = Ledger({name: ModelLimits(max_requests=40, max_bytes=400) for name in "abcd"})

    def flood(model: str, size: int) -> int:
        for held in range(1000):
            try:
                book.hold(model, size)
            except QueueFull as error:
                assert error.bound == ("bytes" if size else "requests")
                return held
        raise AssertionError

    assert flood("a", 0) == 40  # alone it reaches its own bound
    assert flood("b", 0) == 25  # and leaves as much to the others as it has
    assert flood("c", 0) == 13
    book.hold("d", 0)
    assert sum(book.demand(name).held for name in "abcd") < 90
    for _ in range(40):
        book.leave("a", 0)
    assert flood("c", 0) == 19  # what one gives back is there for all, at once
    book = Ledger({name: ModelLimits(max_requests=1000, max_bytes=400) for name in "abcd"})
    assert [flood(name, 10) for name in "abc"] == [40, 25, 13]
    book.hold("d", 10)
    with pytest.raises(QueueFull, match="250 bytes of it are held and 790 of all models, of 900 at most; this has 10"):
        book.hold("b", 10)
    book.hold("b", 0)


def test_first_demand_is_told_once_for_each_time_without_a_replica() -> None:
    book, told = ledger(), list[str]()
    book.on_first_demand(told.append)
    book.hold("m", 0)
    book.hold("m", 0)
    assert told == ["m"]
    book.set_replicas("m", 1, 1)
    book.hand_over("m", 0)
    book.set_replicas("m", 0, 0)  # the replica died under it: that is demand without a replica again
    assert told == ["m", "m"]
    book.leave("m", 0)
    book.end("m")
    book.hold("m", 0)
    assert told == ["m"] * 3


def test_first_demand_opens_an_activation_before_anybody_is_told() -> None:
    clock = StandingClock(100.0)
    activations = Activations(clock)
    book, seen = Ledger(activations=activations), list[tuple[float | None, dict[str, float]]]()

    def look(model: str) -> None:
        activation = activations.current(model)
        assert activation is not None
        seen.append((activation.began, dict(activation.phases)))

    book.on_first_demand(look)
    book.on_first_demand_anywhere(look)
    book.declare("m", ModelLimits())
    clock.moment = 100.5
    book.hold("m", 0, arrived=100.25)
    book.hold("m", 0, arrived=100.5)  # no edge
    assert seen == [(100.25, {"held": 0.25})] * 2
    book.set_replicas("m", 1, 1)
    activations.served("m")
    book.set_replicas("m", 0, 0)  # the replica died: a scale-up begins, and no request has just arrived
    assert seen[2:] == [(100.5, {})] * 2


def test_a_request_that_finds_a_replica_opens_none() -> None:
    book = ledger()
    book.set_replicas("m", 1, 1)
    book.start("m")
    book.hold("m", 0)
    book.add_remote("m", 1, 0)
    assert book.activations.current("m") is None


def test_a_draining_replica_is_none_to_wait_for() -> None:
    book, told = ledger(), list[str]()
    book.on_first_demand(told.append)
    book.set_replicas("m", ready=0, replicas=1)
    book.hold("m", 0)
    assert told == ["m"]


def test_a_failing_callback_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    book, told = ledger(), list[str]()
    book.on_first_demand(lambda model: told[0])
    book.on_first_demand(told.append)
    book.hold("m", 0)
    assert told == ["m"]
    assert "a listener failed" in caplog.text


def test_a_model_nobody_declared() -> None:
    book = ledger()
    for ask in (book.demand, book.limits, book.subscribe, book.withdraw):
        with pytest.raises(UnknownModel, match="model 'x' is not known; the gateway's /v1/models lists those that are"):
            ask("x")
    assert (book.knows("x"), book.knows("m"), list(book.models())) == (False, True, ["m"])


def test_withdrawing_keeps_the_account_until_its_work_is_done() -> None:
    book = ledger()
    book.start("m")
    book.report_failure("m", "no memory")
    book.withdraw("m")
    with pytest.raises(UnknownModel):
        book.demand("m")
    book.declare("m", ModelLimits())
    assert (book.demand("m").in_flight, book.failure("m")) == (1, "no memory")
    book.withdraw("m")
    book.end("m")
    book.declare("m", ModelLimits())
    assert book.failure("m") == ""  # a new account: the old one had gone


def test_a_failure_is_kept_until_a_replica_is_ready() -> None:
    book = ledger()
    book.report_failure("m", "no memory")
    assert book.failure("m") == "no memory"
    book.set_replicas("m", 1, 1)
    assert book.failure("m") == ""


async def test_a_burst_wakes_a_watcher_once() -> None:
    book, woken = ledger(), asyncio.Queue[Demand]()

    async def watch() -> None:
        with book.subscribe("m") as subscription:
            while True:
                await subscription.changed()
                woken.put_nowait(book.demand("m"))

    task = asyncio.create_task(watch())
    await asyncio.sleep(0)
    for _ in range(100):
        book.hold("m", 0)
    assert await woken.get() == Demand(100, 0, 0)
    assert woken.empty()
    book.leave("m", 0)
    assert await woken.get() == Demand(99, 0, 0)
    task.cancel()


async def test_a_change_between_two_looks_is_not_missed() -> None:
    book = ledger()
    with book.subscribe("m") as subscription:
        book.hold("m", 0)
        async with asyncio.timeout(1):
            await subscription.changed()
        waiting = asyncio.create_task(subscription.changed())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        book.leave("m", 0)
        async with asyncio.timeout(1):
            await subscription.changed()
        book.withdraw("m")
        async with asyncio.timeout(1):
            await subscription.changed()


def test_the_demand_of_other_gateways() -> None:
    book = Ledger({"m": ModelLimits(max_requests=1)})
    own: list[str] = []
    anywhere: list[str] = []
    changed: list[str] = []
    book.on_first_demand(own.append)
    book.on_first_demand_anywhere(anywhere.append)
    book.on_change(changed.append)
    book.add_remote("m", 5, 1)
    assert (book.demand("m"), book.demand_anywhere("m")) == (Demand(0, 0, 0), Demand(5, 1, 0))
    assert (own, anywhere, changed) == ([], ["m"], [])
    book.hold("m", 0)  # the bound is on our own
    assert (own, anywhere, changed) == (["m"], ["m"], ["m"])
    assert book.demands() == {"m": Demand(1, 0, 0)}
    book.leave("m", 0)
    book.set_replicas("m", 1, 1)
    book.set_replicas("m", 0, 0)  # the last replica is lost under demand elsewhere
    assert (own, anywhere) == (["m"], ["m", "m"])
    book.add_remote("m", -5, -1)
    book.add_remote("other", 1, 0)
    assert book.own("other") == Demand(0, 0, 0)
    book.declare("other", ModelLimits())
    assert (own, anywhere) == (["m"], ["m", "m", "other"])
    book.withdraw("other")
    book.add_remote("other", -1, 0)
    assert list(book.models()) == ["m"]


def test_what_is_asked_elsewhere_is_demand_that_opens_no_activation() -> None:
    book = ledger()
    here, anywhere, changed, quiet = list[str](), list[str](), list[str](), list[str]()
    book.on_first_demand(here.append)
    book.on_first_demand_anywhere(anywhere.append)
    book.on_change(changed.append)
    book.on_quiet(quiet.append)
    book.set_elsewhere("m", Elsewhere(pending=5))
    assert (book.demand("m"), book.demand_anywhere("m").pending, book.demands()) == (Demand(0, 0, 0), 5, {})
    assert (here, anywhere, changed) == (["m"], ["m"], [])
    assert book.activations.current("m") is None
    book.hold("m", 0)
    assert book.activations.current("m"), "a request here has one"
    assert (here, anywhere) == (["m", "m"], ["m"])
    book.leave("m", 0)
    book.set_elsewhere("m", Elsewhere(pending=5))
    assert (quiet, book.turns("m")) == ([], 1)
    book.set_elsewhere("m", NOTHING)
    assert (quiet, book.turns("m")) == (["m"], 2)
    book.set_elsewhere("m", Elsewhere(replicas=1))
    assert (here, anywhere) == (["m"] * 3, ["m"] * 2)
    book.withdraw("m")
    book.set_elsewhere("m", NOTHING)
    assert book.own("m") == Demand(0, 0, 0)


def test_where_demand_begins_and_ends_is_told_whether_or_not_there_is_a_replica() -> None:
    book = ledger()
    told = list[str]()
    book.on_asked(lambda model: told.append("asked"))
    book.on_quiet(lambda model: told.append("quiet"))
    book.set_replicas("m", 1, 1)
    book.start("m")
    book.add_remote("m", 1, 0)
    book.end("m")
    assert told == ["asked"]
    book.add_remote("m", -1, 0)
    book.set_elsewhere("m", Elsewhere(pending=1))
    book.set_elsewhere("m", NOTHING)
    assert told == ["asked", "quiet"] * 2


def test_while_a_source_is_silent_a_model_is_not_idle_and_not_asked_for() -> None:
    book = ledger()
    anywhere, quiet, asked = list[str](), list[str](), list[str]()
    book.on_first_demand_anywhere(anywhere.append)
    book.on_quiet(quiet.append)
    book.on_asked(asked.append)
    book.set_replicas("m", 1, 1)
    book.set_elsewhere("m", Elsewhere(unknown="redis says nothing"))
    assert (book.demand_anywhere("m").pending, book.demand_anywhere("m").idle, quiet) == (0, False, [])
    book.set_replicas("m", 0, 0)
    assert anywhere == []
    book.set_elsewhere("m", NOTHING)
    assert (book.demand_anywhere("m").idle, quiet, asked) == (True, ["m"], [])
    book.set_elsewhere("m", Elsewhere(unknown="redis says nothing"))
    book.start("m")
    assert asked == ["m"]


def test_since_when_nobody_asks() -> None:
    clock = StandingClock(100.0)
    book = Ledger(activations=Activations(clock))
    quiet: list[str] = []
    book.on_quiet(quiet.append)
    book.declare("m", ModelLimits())
    clock.moment = 110.0
    assert (book.quiet_since("m"), book.quiet_since("other")) == (100.0, 110.0)
    book.start("m")
    book.add_remote("m", 1, 0)
    clock.moment = 120.0
    book.end("m")
    assert quiet == [], "another gateway has one still"
    clock.moment = 130.0
    book.add_remote("m", -1, 0)
    assert (quiet, book.quiet_since("m")) == (["m"], 130.0)
