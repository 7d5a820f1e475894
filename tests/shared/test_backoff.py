"""The waits between two tries."""

import random

from zerowake_shared.backoff import Backoff


def test_waits_double_up_to_the_last() -> None:
    backoff = Backoff(0.2, 1.0)
    assert [backoff.next() for _ in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.failures == 5


def test_a_success_begins_anew() -> None:
    backoff = Backoff(0.2, 1.0)
    for _ in range(4):
        backoff.next()
    backoff.reset()
    assert backoff.failures == 0
    assert [backoff.next(), backoff.next()] == [0.2, 0.4]


def test_another_factor() -> None:
    backoff = Backoff(1.0, 3.0, factor=1.5)
    assert [backoff.next() for _ in range(5)] == [1.0, 1.5, 2.25, 3.0, 3.0]


def test_jitter_shortens_by_its_share_at_most_and_comes_from_the_given_chance() -> None:
    backoff = Backoff(1.0, 1.0, jitter=0.5, chance=random.Random(7))
    waits = [backoff.next() for _ in range(1000)]
    assert all(0.5 <= wait <= 1.0 for wait in waits)
    assert min(waits) < 0.55 and max(waits) > 0.95
    again = Backoff(1.0, 1.0, jitter=0.5, chance=random.Random(7))
    assert [again.next() for _ in range(1000)] == waits


def test_jitter_does_not_add_up() -> None:
    backoff = Backoff(1.0, 64.0, jitter=0.5, chance=random.Random(7))
    assert all(2.0**number / 2 <= backoff.next() <= 2.0**number for number in range(7))


def test_what_fails_for_years_is_still_tried() -> None:
    backoff = Backoff(0.2, 300.0)
    for _ in range(5000):  # 2.0 ** 1024 is more than a float holds
        wait = backoff.next()
    assert wait == 300.0
