"""Factors by hand, and the gate that each of them passes by itself."""

import numpy as np
import pytest

from scaler.forecast.seasons import SEASONS, factors

HOUR, RETURN, WEEKDAY = SEASONS
MONDAY = 1_799_625_600.0  # 2027-01-11 00:00 UTC
DAY = 86_400.0
JUST, LONG = 60.0, 7200.0  # seconds idle


def rows(models: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.zeros(models, np.dtype([field for season in SEASONS for field in season.fields]))


def passes(model: np.ndarray[tuple[int], np.dtype[np.void]], at: float, ends: float, came: bool, idle: float = JUST) -> None:
    """A minute in which so many ends were to be expected, for a table of one model, idle for so many seconds."""
    for season in SEASONS:
        season.state(model, at, np.array([idle]), np.array([ends]))
        season.learn(model, at, np.array([True]), -np.expm1(-np.array([ends])), np.array([came]))


def test_the_parts_are_hours_of_the_day_and_weekdays() -> None:
    assert [HOUR.part(MONDAY + hours * 3600.0) for hours in (0, 0.99, 1, 23.5, 24)] == [0, 0, 1, 23, 0]
    assert [WEEKDAY.part(MONDAY + days * DAY) for days in (0, 0.99, 1, 6.5, 7)] == [0, 0, 1, 6, 0]


def test_a_factor_is_what_came_by_what_was_due() -> None:
    table = rows(2)
    assert HOUR.factors(table, MONDAY).tolist() == [1.0, 1.0]
    table["hour_came"][0, 5], table["hour_due"][0, 5] = 5.0, 2.0
    assert HOUR.factors(table, MONDAY + 5 * 3600).tolist() == pytest.approx([(5 + 0.1) / (2 + 0.1), 1.0])


def test_factors_count_where_they_may() -> None:
    table = rows(3)
    table["hour_came"][:, 0], table["weekday_came"][:, 0] = 0.2, 0.4
    table["hour_counts"], table["weekday_counts"] = [True, True, False], [False, True, False]
    assert factors(table, MONDAY, np.repeat(JUST, 3)).tolist() == pytest.approx([3.0, 15.0, 1.0])
    assert factors(table, MONDAY, np.repeat(LONG, 3)).tolist() == pytest.approx([1.0, 5.0, 1.0]), "an hour is for those just asked for"


def test_an_hour_counts_once_it_has_shown_itself_and_learns_anew() -> None:
    table = rows(1)

    def day(number: int, busy: int) -> None:
        for quarter in range(96):
            passes(table, MONDAY + number * DAY + quarter * 900.0, 0.03, came=quarter // 4 == busy)

    day(0, busy=9)
    assert not table["hour_counts"][0], "on the first day nothing is known"
    for number in range(1, 6):
        day(number, busy=9)
    assert table["hour_counts"][0]
    assert HOUR.factors(table, MONDAY + 9 * 3600)[0] > 10
    assert HOUR.factors(table, MONDAY + 3 * 3600)[0] < 0.7
    before = HOUR.factors(table, MONDAY + 9 * 3600)[0]
    for number in range(6, 20):
        day(number, busy=20)
    assert HOUR.factors(table, MONDAY + 20 * 3600)[0] > 10
    assert HOUR.factors(table, MONDAY + 9 * 3600)[0] < before / 2


def test_half_hours_are_for_those_who_were_idle_for_long_and_count_for_the_next_ones() -> None:
    table = rows(1)
    for number in range(4):
        for minute in range(0, 1440, 5):
            passes(table, MONDAY + number * DAY + minute * 60.0, 0.005, minute == 9 * 60, LONG)
    assert table["return_counts"][0] and not table["hour_came"].any()
    at, before, long_before = (RETURN.factors(table, MONDAY + hours * 3600.0)[0] for hours in (9, 8.5, 7))
    assert at > before > 10 * long_before
    table["weekday_counts"] = False
    assert factors(table, MONDAY + 9 * 3600.0, np.array([LONG])).tolist() == [at]
    assert factors(table, MONDAY + 9 * 3600.0, np.array([JUST])).tolist() == [1.0]


def test_a_factor_that_has_become_wrong_does_not_count() -> None:
    table = rows(1)
    table["hour_came"][0, 9], table["hour_credit"][0], table["hour_counts"][0] = 60.0, 15.0, True
    for minute in range(60):
        passes(table, MONDAY + 9 * 3600.0 + minute * 60.0, 0.01, came=False)
    assert not table["hour_counts"][0]


def test_a_weekday_counts_by_itself() -> None:
    table = rows(1)
    for day in range(21):
        for quarter in range(96):
            passes(table, MONDAY + day * DAY + quarter * 900.0, 0.05, came=day % 7 < 5 and quarter % 16 == 0)
    assert table["weekday_counts"][0]
    assert WEEKDAY.factors(table, MONDAY + 5 * DAY)[0] == pytest.approx(0.1 / (0.1 + 3 * 96 * 0.05), rel=0.1)
    assert WEEKDAY.factors(table, MONDAY)[0] > 1.0


def test_who_was_not_idle_learns_nothing() -> None:
    table = rows(2)
    HOUR.state(table, MONDAY, np.array([60.0, 60.0]), np.array([0.5, 0.5]))
    HOUR.learn(table, MONDAY, np.array([True, False]), np.array([0.4]), np.array([True]))
    HOUR.learn(table, MONDAY + 3600, np.array([False, False]), np.array([]), np.array([], bool))
    assert table["hour_came"][:, 0].tolist() == [1.0, 0.0]
    assert table["hour_due"][:, 0].tolist() == pytest.approx([0.4, 0.0])
