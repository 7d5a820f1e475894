"""What a node gives away at most."""

import threading

from restore_agent.transfer.egress import Egress
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import PATIENCE


def took(egress: Egress, size: int) -> tuple[threading.Thread, list[bool]]:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(egress.take(size)))
    thread.start()
    return thread, answers


def test_what_was_not_sent_in_an_idle_hour_is_no_burst() -> None:
    clock = StandingClock(100.0)
    egress = Egress(1000.0, 1, clock)
    clock.moment += 3600
    assert egress.take(100)  # a tenth of a second's worth
    assert egress.take(10)  # begins now
    waiting, answers = took(egress, 10)  # what comes next waits for those ten bytes to flow, and this clock stands
    waiting.join(0.1)
    assert waiting.is_alive()
    egress.close()
    waiting.join(PATIENCE)
    assert answers == [False]
    assert egress.sent == 110


def test_who_waits_goes_on_when_the_time_has_come() -> None:
    clock = StandingClock(100.0)
    egress = Egress(1000.0, 1, clock)
    assert egress.take(150)
    clock.moment += 0.02
    waiting, answers = took(egress, 1)
    waiting.join(0.01)
    assert waiting.is_alive()
    clock.moment += 0.2
    waiting.join(PATIENCE)
    assert answers == [True]


def test_more_readers_than_may_be_are_refused_until_one_has_ended() -> None:
    egress = Egress(1e9, 2)
    with egress.stream(0) as first, egress.stream(0) as second, egress.stream(0) as third:
        assert (first, second, third) == (True, True, False)
    with egress.stream(0) as again:
        assert again


def test_a_reader_may_wait_for_another_to_end() -> None:
    egress = Egress(1e9, 1)
    entered = threading.Event()

    def second() -> None:
        with egress.stream(PATIENCE) as has_room:
            if has_room:
                entered.set()

    with egress.stream(0):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(PATIENCE)
    thread.join(PATIENCE)


def test_after_its_end_nothing_is_sent() -> None:
    egress = Egress(1e9, 1)
    egress.close()
    assert not egress.take(1)
    with egress.stream(PATIENCE) as has_room:
        assert not has_room
