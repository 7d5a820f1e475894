"""A day in the life of one model, in virtual time, every figure of it exact: what a phase or a cooldown lasts follows from the rules alone.

What is real in it, and what is not: tests/worlds/day.py.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time

import pytest
from zerowake_proto import agent_pb2

from scaler.books.hpa import SYNC_SECONDS
from scaler.local.config import ModelSection
from tests.worlds.day import CUDA, FAILING, FIRST_BYTE, HEALTH, HOUR, IMAGE, MINUTE, MODEL, RESTORE, STAGING, Day
from tests.worlds.virtual_time import run

exactly = functools.partial(pytest.approx, rel=0.0, abs=1e-6)  # time is kept to the microsecond


def requests(seed: int) -> list[tuple[float, float]]:
    """Moments and lengths: some every minute at noon, few in the morning and in the evening, none from ten at night until seven."""
    chance = random.Random(seed)
    found: list[tuple[float, float]] = [(STREAM_AT, STREAM_SECONDS)]
    moment = 7 * HOUR
    while (moment := moment + chance.expovariate(1 / _gap(moment))) < 22 * HOUR:
        found.append((round(moment, 3), round(chance.uniform(1.0, 20.0), 3)))
    return sorted(found)


def _gap(moment: float) -> float:
    """The mean time from one request to the next."""
    return (1.5 if 11 * HOUR < moment < 14 * HOUR else 8.0) * MINUTE


STREAM_AT, STREAM_SECONDS = 21 * HOUR + 0.5, 40 * MINUTE
FAILS_FROM = 15 * HOUR


class Expected:
    """What KEDA's rules make of a day's requests, worked out from the requests alone.

    A request that finds nothing wakes a replica at once. Each poll that finds a request, and each push (a request after none, three seconds
    after the last one at least), is activity; the first poll more than the cooldown after the last activity takes the replica away.
    """

    def __init__(self, asked: list[tuple[float, float]], failing: float) -> None:
        self.wishes: list[tuple[float, int]] = []
        self.waited: list[float] = []  # by activation: seconds until its replica was ready
        ready = active = pushed = busy_until = -1.0
        polls = iter(range(0, 24 * 3600, int(MODEL.polling_seconds)))
        poll = next(polls)
        for begin, seconds in [*asked, (24 * HOUR, 0.0)]:
            while poll < begin:
                if poll < busy_until:
                    active = poll
                elif self.up and poll - active > MODEL.cooldown_seconds:
                    self.wishes.append((poll, 0))
                poll = next(polls, 24 * HOUR)
            if begin == 24 * HOUR:
                return
            if not self.up:
                self.wishes.append((begin, 1))
                self.waited.append(RESTORE + (failing if begin > FAILS_FROM and not any(map(RESTORE.__lt__, self.waited)) else 0.0))
                ready = begin + self.waited[-1]
                active = pushed = begin
            elif begin > busy_until and begin >= pushed + 3.0:
                active = pushed = begin
            busy_until = max(busy_until, max(begin, ready) + seconds)

    @property
    def up(self) -> bool:
        return bool(self.wishes) and self.wishes[-1][1] == 1


async def _live(seed: int, asked: list[tuple[float, float]]) -> Day:
    async with Day(seed) as day, asyncio.TaskGroup() as group:
        for moment, seconds in asked:
            if day.clock.now() < FAILS_FROM < moment:
                await day.until(FAILS_FROM)
                day.agent.fails = 2
            await day.until(moment)
            group.create_task(day.ask(seconds))
        await day.until(24 * HOUR)
    return day


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_day(seed: int) -> None:
    asked = requests(seed)
    # The start that fails: two tries, and the pauses after them.
    expected = Expected(asked, failing=FAILING + 0.2 + FAILING + 0.4)
    before = time.process_time()
    day = run(_live(seed, asked))
    assert time.process_time() - before < 5.0, "a day that is not lived through"

    assert day.answered == len(asked)
    assert day.wishes == expected.wishes
    ups = [moment for moment, replicas in day.wishes if replicas == 1]
    downs = [moment for moment, replicas in day.wishes if replicas == 0]
    assert len(ups) == len(downs) > 20
    assert not any(moment < 7 * HOUR or moment > 22.2 * HOUR for moment in ups + downs)
    assert not any(STREAM_AT < moment < STREAM_AT + STREAM_SECONDS + MODEL.cooldown_seconds for moment in ups + downs)

    assert day.agent.staged == [STAGING]
    assert day.agent.restored == [exactly(moment + waited) for moment, waited in zip(ups, expected.waited, strict=True)]
    assert day.agent.released == downs

    assert sorted(set(expected.waited)) == [RESTORE, exactly(RESTORE + 1.6)]
    for activation, up, waited in zip(day.ended, ups, expected.waited, strict=True):
        assert activation.outcome == "served"
        assert activation.total == exactly(waited + FIRST_BYTE)
        assert {name: round(seconds, 6) for name, seconds in activation.phases.items()} == {
            "held": 0.0,
            "pushed": 0.0,
            "scheduled": 0.0,
            "image": IMAGE,
            "cuda": CUDA,
            "health": HEALTH,
            "first_byte": FIRST_BYTE,
            "unaccounted": round(waited - RESTORE, 6),  # the tries that failed
        }
        assert activation.began == exactly(day.clock.wall() - 24 * HOUR + up)


def test_the_same_day_again_is_the_same() -> None:
    """Ids, too: whoever replays a day finds the activation that a log line names."""
    asked = requests(4)
    one, other = run(_live(4, asked)), run(_live(4, asked))
    assert [each.id for each in one.ended] == [each.id for each in other.ended]
    assert len({each.id for each in one.ended}) == len(one.ended)
    assert one.wishes == other.wishes


def test_a_burst_at_noon() -> None:
    """Twenty requests at once are worth three replicas; the HPA keeps them for its window, and the cooldown ends the last of them."""

    async def burst() -> Day:
        async with Day(1) as day, asyncio.TaskGroup() as group:
            await day.until(12 * HOUR + 7)
            for _ in range(20):
                group.create_task(day.ask(20.0))
            await day.until(13 * HOUR)
        return day

    day = run(burst())
    noon = 12 * HOUR
    assert day.answered == 20
    (_, (shrunk, _), _) = day.wishes[1:]
    assert day.wishes == [(noon + 7, 1), (noon + 7, 3), (shrunk, 1), (noon + 330, 0)]
    assert noon + 7 + 20 + 300 - SYNC_SECONDS < shrunk < noon + 7 + 20 + 300 + SYNC_SECONDS
    assert day.agent.restored == [exactly(noon + 7 + RESTORE)] * 3
    assert day.agent.released == [shrunk] * 2 + [noon + 330]
    assert [activation.total for activation in day.ended] == [exactly(RESTORE + FIRST_BYTE)]


@pytest.mark.parametrize(("limit", "ends"), [(None, 10.0 + 2 * HOUR), (60.0, 20.0 + 60.0)])
def test_a_long_answer_ends_the_drain_of_its_replica(limit: float | None, ends: float) -> None:
    """And not the other way round, unless the model's owner has set a limit."""

    async def shrink() -> tuple[Day, int]:
        async with Day(1, MODEL.model_copy(update={"max_drain_seconds": limit})) as day, asyncio.TaskGroup() as group:
            await day.deployment.scale(2)
            await day.until(10.0)
            for _ in range(2):
                group.create_task(day.ask(2 * HOUR))
            await day.until(20.0)
            await day.deployment.scale(1)
            await day.until(30.0)
            taking = len(day.dispatcher.ready("chat"))
            await day.until(3 * HOUR)
            return day, taking

    day, taking = run(shrink())
    assert (taking, day.answered) == (1, 2)
    assert day.agent.released[0] == exactly(ends)  # the other one stays for the cooldown


def test_a_replica_whose_agent_cannot_end_it_just_now_is_not_asked_again_at_once() -> None:
    async def shrink() -> Day:
        async with Day(1) as day:
            day.agent.cannot_release = 3
            await day.deployment.scale(1)
            await day.until(10.0)
            await day.deployment.scale(0)
            await day.until(20.0)
        return day

    assert run(shrink()).agent.released == [exactly(10.0 + since) for since in (0.0, 1.0, 2.0, 3.0)]


def test_a_replica_that_finishes_its_answers_is_taken_back_when_more_are_wanted() -> None:
    async def shrink_and_grow() -> Day:
        async with Day(1) as day, asyncio.TaskGroup() as group:
            await day.deployment.scale(2)
            await day.until(10.0)
            for _ in range(2):
                group.create_task(day.ask(HOUR))
            await day.until(20.0)
            await day.deployment.scale(1)
            await day.until(30.0)
            await day.deployment.scale(2)
            await day.until(31.0)
            assert len(day.dispatcher.ready("chat")) == 2
            await day.until(HOUR)
            await day.deployment.scale(2)
            await day.until(HOUR + 11.0)
        return day

    day = run(shrink_and_grow())
    assert (day.agent.asked, day.answered) == (2, 2)


def test_a_start_is_not_given_up_for_a_later_one_that_was_faster() -> None:
    """The second replica is heard of while all three starts are under way: it is one of them, and none too many."""

    async def burst() -> Day:
        async with Day(1) as day, asyncio.TaskGroup() as group:
            await day.until(10.0)
            day.agent.slow = [0.0, 0.0, 1.0]  # the first one takes longest
            for _ in range(20):
                group.create_task(day.ask(20.0))
            await day.until(60.0)
        return day

    day = run(burst())
    assert day.agent.asked == 3
    assert day.agent.restored == [exactly(10.0 + RESTORE)] * 2 + [exactly(11.0 + RESTORE)]


def waiting(**keys: object) -> ModelSection:
    """The model, waiting in another way. The replica of a request in the first seconds ends at 330 s: at the poll after the cooldown."""
    return ModelSection.model_validate(MODEL.model_dump() | keys)


def test_an_idle_replica_goes_down_rung_by_rung_and_nothing_pushes_it_up() -> None:
    """Parked for ten minutes, then a standby for an hour. A request on the way finds what is there, and everything begins anew."""

    async def live() -> Day:
        async with Day(1, waiting(parked_seconds=10 * MINUTE, standby_seconds=HOUR)) as day:
            for moment in (10.0, 500.0, 30 * MINUTE):
                await day.until(moment)
                await day.ask(1.0)
            await day.until(3 * HOUR)
        return day

    day = run(live())
    ends = [330.0, 810.0, 30 * MINUTE + 330.0]
    assert day.agent.demoted == [(each, agent_pb2.RUNG_PARKED) for each in ends] and day.agent.released == []
    assert day.agent.staged == [STAGING], "and never again: it stands higher all the while"
    assert day.agent.stood == [
        (STAGING, agent_pb2.RUNG_MEMORY),
        (330.0, agent_pb2.RUNG_PARKED),
        (500.0, agent_pb2.RUNG_MEMORY),  # woken
        (810.0, agent_pb2.RUNG_PARKED),
        (810.0 + 10 * MINUTE, agent_pb2.RUNG_STANDBY),
        (30 * MINUTE, agent_pb2.RUNG_MEMORY),  # woken
        (ends[2], agent_pb2.RUNG_PARKED),
        (ends[2] + 10 * MINUTE, agent_pb2.RUNG_STANDBY),
        (ends[2] + 10 * MINUTE + HOUR, agent_pb2.RUNG_MEMORY),
    ]
    waited = {"restored": RESTORE, "parked": 0.03, "standby": 0.2}
    assert [each.origin for each in day.ended] == list(waited)
    assert [each.total for each in day.ended] == [exactly(seconds + FIRST_BYTE) for seconds in waited.values()]


def test_what_cannot_be_parked_is_kept_as_a_standby_and_asked_for_less_and_less_often() -> None:
    async def live() -> Day:
        async with Day(1, waiting(stage="parked")) as day:
            day.agent.parks = False
            await day.until(1000.0)
            assert day.agent.stood == [(STAGING, agent_pb2.RUNG_MEMORY), (2 * STAGING, agent_pb2.RUNG_STANDBY)]
            await day.ask(1.0)
            await day.until(1500.0)
        return day

    day = run(live())
    first = 2 * STAGING
    assert day.agent.refused[:5] == [exactly(first + since) for since in (0.0, 30.0, 90.0, 210.0, 450.0)]
    ((ended, rung),) = day.agent.demoted
    assert rung == agent_pb2.RUNG_STANDBY and day.agent.stood[-1] == (ended, rung) and day.agent.released == []
    assert ended in day.agent.refused and [each.origin for each in day.ended] == ["standby"]


@pytest.mark.parametrize(("keys", "stands"), [({}, None), ({"standby_seconds": 60}, agent_pb2.RUNG_STANDBY)])
def test_an_idle_replica_that_cannot_be_parked_is_kept_as_is_asked_for_after_that(keys: dict[str, float], stands: int | None) -> None:
    async def live() -> Day:
        async with Day(1, waiting(parked_seconds=60, **keys)) as day:
            day.agent.parks = False
            await day.until(10.0)
            await day.ask(1.0)
            await day.until(1000.0)
        return day

    day = run(live())
    assert day.agent.refused == [330.0], "once: its end is not begun again and again"
    assert (day.agent.released, day.agent.demoted) == (([], [(330.0, stands)]) if stands else ([330.0], []))


def test_one_that_is_to_be_parked_comes_back_there_when_the_room_that_others_wanted_is_free() -> None:
    """It goes up, rung by rung; its agent takes it down; half a minute later it goes up again, and as a standby it waits meanwhile."""

    async def live() -> Day:
        async with Day(1, waiting(stage="parked")) as day:
            await day.until(100.0)
            day.agent.stands(agent_pb2.RUNG_STANDBY)
            await day.until(200.0)
        return day

    day = run(live())
    assert day.agent.stood == [
        (STAGING, agent_pb2.RUNG_MEMORY),
        (2 * STAGING, agent_pb2.RUNG_STANDBY),
        (3 * STAGING, agent_pb2.RUNG_PARKED),
        (100.0, agent_pb2.RUNG_STANDBY),
        (exactly(130.0 + STAGING), agent_pb2.RUNG_PARKED),
    ]
