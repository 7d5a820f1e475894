"""Demand as it is read: a subscription misses no change, and none is left behind by whoever gives up."""

import asyncio

import pytest

from scaler.books.demand import Demand, Elsewhere, Subscription, UnknownModel, Watched


def test_pending_is_what_waits_and_what_is_being_worked_on() -> None:
    assert Demand(held=3, in_flight=2, replicas=1).pending == 5


async def test_a_change_before_anybody_waits_is_seen_at_once() -> None:
    watched = Watched()
    with Subscription(watched) as subscription:
        watched.changed()
        watched.changed()
        async with asyncio.timeout(5):
            await subscription.changed()
        assert not watched.waiters, "two changes are one to whoever looks later"
        waiting = asyncio.create_task(subscription.changed())
        await asyncio.sleep(0)
        assert not waiting.done()
        watched.changed()
        await asyncio.wait_for(waiting, 5)


async def test_every_subscription_hears_of_a_change() -> None:
    watched = Watched()
    with Subscription(watched) as one, Subscription(watched) as other:
        waiting = [asyncio.create_task(each.changed()) for each in (one, other)]
        await asyncio.sleep(0)
        watched.changed()
        await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert watched.watchers == 2
    assert watched.watchers == 0


async def test_who_gives_up_leaves_nothing_and_misses_nothing() -> None:
    watched = Watched()
    with Subscription(watched) as subscription:
        waiting = asyncio.create_task(subscription.changed())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not watched.waiters
        watched.changed()
        await asyncio.wait_for(subscription.changed(), 5)


def test_an_unknown_model_names_no_others() -> None:
    with pytest.raises(UnknownModel, match=r"^model 'c' is not known; the gateway's /v1/models lists those that are$"):
        raise UnknownModel("c", ["b", "a"])
    assert "none is declared" in str(UnknownModel("c", []))


def test_replicas_that_nobody_reaches_are_not_counted_on() -> None:
    """Whoever divides by the target finds one replica for each of them, beside those for what is pending."""
    assert Demand(held=1, in_flight=0, replicas=1).load(8.0) == 1
    assert Demand(held=1, in_flight=0, replicas=1, unreachable=1).load(8.0) == 16
    assert Demand(held=9, in_flight=8, replicas=3, unreachable=2).load(8.0) == 40
    assert Demand(held=0, in_flight=0, replicas=1, unreachable=1).load(8.0) == 0  # nobody asks: nothing is to be made


def test_replicas_that_are_to_be_there_are_a_least_number() -> None:
    hinted = Demand(held=1, in_flight=2, replicas=0, elsewhere=Elsewhere(pending=4, replicas=2))
    assert (hinted.pending, hinted.load(2.0), hinted.load(8.0)) == (7, 7, 16)
    assert Demand(0, 0, 0, elsewhere=Elsewhere(replicas=2)).pending == 2, "it is demand"
    assert Demand(0, 0, 1, unreachable=1, elsewhere=Elsewhere(replicas=2)).load(8.0) == 24


def test_what_a_silent_source_may_stand_for() -> None:
    """Not more than the replicas that there are: what is known to be worth more is acted upon."""
    silent = Elsewhere(unknown="redis says nothing")
    assert Demand(0, 0, 0, elsewhere=silent).unsure(8.0) == "redis says nothing"
    assert Demand(8, 8, 2, elsewhere=silent).unsure(8.0) == "redis says nothing"
    assert Demand(8, 9, 2, elsewhere=silent).unsure(8.0) == ""
    assert Demand(0, 0, 2).unsure(8.0) == ""
