"""What was between two looks, and who was told of it."""

import pytest

from scaler.books.activity import REPEAT_SECONDS, Activity
from scaler.books.demand import UnknownModel
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from tests.worlds.virtual_time import StandingClock


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger({"chat": ModelLimits()})
    ledger.set_replicas("chat", ready=1, replicas=1)
    return ledger


def request(ledger: Ledger) -> None:
    ledger.start("chat")
    ledger.end("chat")


def test_a_request_is_seen_by_a_poll_that_comes_after_other_looks(ledger: Ledger) -> None:
    activity = Activity(ledger)
    assert not activity.look("chat", "KEDA")
    request(ledger)
    assert [activity.look("chat", "KEDA") for _ in range(4)] == [True, True, True, False]  # the HPA's, twice, and the poll


def test_each_looker_sees_for_itself(ledger: Ledger) -> None:
    activity = Activity(ledger)
    request(ledger)
    for _ in range(4):
        last = activity.look("chat", "one")
    assert (last, activity.look("chat", "other")) == (False, True)


def test_the_end_of_a_request_counts(ledger: Ledger) -> None:
    activity = Activity(ledger)
    ledger.start("chat")
    assert [activity.look("chat", "KEDA") for _ in range(5)] == [True] * 5
    ledger.end("chat")
    assert activity.look("chat", "KEDA")


def test_what_was_pushed_is_known(ledger: Ledger) -> None:
    clock = StandingClock(100.0)
    activity = Activity(ledger, clock)
    request(ledger)
    assert activity.untold("chat")
    activity.tell("chat")
    assert not activity.untold("chat")
    assert activity.look("chat", "KEDA"), "it may be taking it in"
    clock.moment += 1
    assert not activity.look("chat", "KEDA")
    ledger.add_remote("chat", 1, 0)
    ledger.add_remote("chat", -1, 0)
    assert activity.untold("chat"), "another gateway's request counts as well"


def test_while_a_push_is_due_every_look_hears_what_it_will_say(ledger: Ledger) -> None:
    clock = StandingClock(100.0)
    activity = Activity(ledger, clock)
    activity.tell("chat")
    request(ledger)
    clock.moment += REPEAT_SECONDS
    assert [activity.look("chat", "KEDA") for _ in range(9)] == [True] * 9
    activity.tell("chat")
    clock.moment += 1
    assert not activity.look("chat", "KEDA")


def test_a_push_that_does_not_come_is_not_waited_for(ledger: Ledger) -> None:
    """Its stream has ended, and nobody is told of anything."""
    clock = StandingClock(100.0)
    activity = Activity(ledger, clock)
    activity.tell("chat")
    request(ledger)
    clock.moment += REPEAT_SECONDS + 1
    assert [activity.look("chat", "KEDA") for _ in range(4)] == [True, True, True, False]


def test_nobody_is_there_for_a_replica(ledger: Ledger) -> None:
    activity = Activity(ledger)
    ledger.set_replicas("chat", ready=0, replicas=0)
    ledger.hold("chat", 0)
    ledger.leave("chat", 0)
    assert not activity.untold("chat")
    assert not activity.look("chat", "KEDA"), "who has left needs no replica"


def test_an_unknown_model(ledger: Ledger) -> None:
    activity = Activity(ledger)
    assert not activity.untold("x")
    with pytest.raises(UnknownModel):
        activity.look("x", "KEDA")


def test_a_replica_that_loads_counts_though_whoever_asked_has_left() -> None:
    ledger = Ledger({"chat": ModelLimits()})
    activity, loading = Activity(ledger), {"chat"}
    activity.counts_loading(loading.__contains__)
    request(ledger)
    assert [activity.look("chat", "KEDA") for _ in range(5)] == [True] * 5
    loading.clear()
    assert not activity.look("chat", "KEDA")
