"""What each policy thinks of its models, by numbers that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from scaler.forecast.forecast import Forecast
from scaler.plan.worth import Objective
from scaler.simulate.policies import Belady, Clairvoyant, GreedyDual, Histogram, KeepAlive, Zerowake

SIZES, SAVED = np.array([10.0, 20.0]), np.array([2.0, 4.0])


def test_greedy_dual_ages_by_what_it_has_dropped() -> None:
    policy = GreedyDual(SIZES, SAVED)
    for _ in range(3):
        policy.ended(0, 0.0, 0.0)
    policy.ended(1, 0.0, 0.0)
    assert list(policy.worth_of(0.0)) == pytest.approx([0.6, 0.2])
    policy.left(0)
    policy.ended(1, 0.0, 0.0)
    policy.ended(0, 0.0, 0.0)
    assert list(policy.worth_of(0.0)) == pytest.approx([0.6 + 0.2, 0.6 + 2 * 0.2])


def test_keep_alive_ends() -> None:
    policy = KeepAlive(SIZES, SAVED)
    policy.ended(0, 100.0, 0.0)
    assert policy.is_kept(0, 700.0) and not policy.is_kept(0, 701.0)


def test_the_histogram_lets_go_until_shortly_before_it_expects_a_request() -> None:
    policy = Histogram(SIZES, SAVED)
    at = 0.0
    for _ in range(12):
        policy.ended(0, at, 0.0)
        at += 3600
        policy.began(0, at)
    policy.ended(0, at, 0.0)
    policy.ended(1, at - 5000, 0.0)
    early, due, over = (policy.worth_of(at + idle) for idle in (1800, 3590, 4000))
    assert early[0] < early[1] and over[0] < over[1] and due[0] > due[1]
    assert (list(policy.wishes(at + 1800)), list(policy.wishes(at + 3590))) == ([], [0])


def test_those_that_know_the_future_keep_what_is_next() -> None:
    belady, clairvoyant = Belady(SIZES, SAVED), Clairvoyant(SIZES, SAVED, np.array([5000.0, 50.0]))
    belady.ended(0, 0.0, 100.0)
    belady.ended(1, 0.0, 60.0)
    assert belady.worth_of(0.0)[0] > belady.worth_of(0.0)[1]  # later, and half as large
    assert list(clairvoyant.wishes(0.0)) == [1]
    clairvoyant.began(1, 50.0)
    assert list(clairvoyant.wishes(4000.0)) == [0]


def test_the_products_numbers_are_those_of_its_forecast() -> None:
    policy = Zerowake(["a", "b"], SIZES, SAVED, Forecast(), 1e9, Objective())
    for visit in range(50):
        policy.began(0, visit * 200.0)
        policy.quiet(0, visit * 200.0 + 10)
    names, hazards = policy._forecast.hazards(1e9 + 9820)
    assert names == ["a", "b"]
    assert list(policy.worth_of(9820.0)) == pytest.approx([hazards[0] / 10, hazards[1] / 20])
    assert list(policy.wishes(9820.0)) == [0, 1]
