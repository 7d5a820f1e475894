"""Bins, hazards and what they add up to, against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.forecast.idle_times import BINS, PRIOR_ENDS, bins_of, expected_ends, forget, hazards, pooled, seconds_in_bins

SECONDS = st.floats(0, 1e9)


def test_bins_are_logarithmic_and_the_last_has_no_end() -> None:
    assert bins_of(np.array([0.0, 9.9, 10.0, 29.9, 30.0, 590_489.0, 590_490.0, 1e12])).tolist() == [0, 0, 1, 1, 2, 10, 11, 11]


def test_an_idle_time_spends_its_seconds_in_every_bin_up_to_its_own() -> None:
    assert seconds_in_bins(np.array([0.0, 25.0, 100.0]))[:, :5].tolist() == [[0, 0, 0, 0, 0], [10, 15, 0, 0, 0], [10, 20, 60, 10, 0]]


@given(st.lists(SECONDS, min_size=1, max_size=5))
def test_no_second_is_lost(idle: list[float]) -> None:
    assert seconds_in_bins(np.array(idle)).sum(axis=1) == pytest.approx(np.array(idle))


def test_a_hazard_is_ends_by_seconds_shrunk_towards_that_of_all() -> None:
    ended, seconds, nothing = np.zeros((2, BINS)), np.zeros((2, BINS)), np.zeros((2, BINS))
    ended[:, 0], seconds[:, 0] = [9, 0], [190, 0]
    of_all = (9 + 1) / (190 + 10)  # one end is believed at first, at one in the ten seconds that the bin is long
    assert pooled(ended, seconds)[0] == pytest.approx(of_all)
    found = hazards(pooled(ended, seconds), ended, seconds, nothing, nothing)
    assert found[0, 0] == pytest.approx((9 + PRIOR_ENDS) / (190 + PRIOR_ENDS / of_all))
    assert found[1, 0] == pytest.approx(of_all)  # it has seen nothing of its own


def test_what_was_seen_lately_is_shrunk_towards_what_was_seen_ever() -> None:
    ever = (100 + PRIOR_ENDS) / (1000 + PRIOR_ENDS / 0.2)
    found = hazards(*(np.array([number]) for number in (0.2, 100.0, 1000.0, 10.0, 10.0)))
    assert found.tolist() == [pytest.approx((10 + PRIOR_ENDS) / (10 + PRIOR_ENDS / ever))]


def test_what_was_seen_often_is_half_forgotten_and_says_the_same() -> None:
    ended, seconds = np.array([[21.0, 20.0]]), np.array([[210.0, 600.0]])
    forget(ended, seconds)
    assert (ended.tolist(), seconds.tolist()) == ([[10.5, 20.0]], [[105.0, 600.0]])


def test_before_anything_was_seen_long_idle_times_are_likelier_to_go_on() -> None:
    found = pooled(*np.zeros((2, 1, BINS)))
    assert found[0] == pytest.approx(0.1)
    assert (np.diff(found) < 0).all()


def test_what_is_expected_crosses_from_bin_to_bin() -> None:
    rates = np.zeros((1, BINS)) + 0.01
    rates[0, 1] = 0.1
    assert expected_ends(rates, np.array([5.0]), 30.0).tolist() == pytest.approx([5 * 0.01 + 20 * 0.1 + 5 * 0.01])
    assert expected_ends(rates, np.array([5.0]), 0.0).tolist() == [0.0]
    assert expected_ends(rates, np.array([5.0]), float("inf")).tolist() == [float("inf")]
