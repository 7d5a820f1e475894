"""Every term of one model's chance, as the forecast makes it."""

from __future__ import annotations

import pytest

from scaler.forecast.explained import explained
from scaler.forecast.forecast import STATEMENT_SECONDS, Forecast
from scaler.forecast.idle_times import PRIOR_ENDS

BEGIN = 1_800_000_000.0


def seen_once() -> Forecast:
    forecast = Forecast()
    for model in ("other", "chat"):
        forecast.declare(model, BEGIN)
    forecast.began("other", BEGIN)
    forecast.began("chat", BEGIN + 5)
    forecast.ended("chat", BEGIN + 8)
    return forecast


def test_its_own_idle_times_and_those_of_all() -> None:
    forecast = seen_once()
    terms = explained(forecast, "chat", BEGIN + 8, 600.0)
    assert terms is not None
    pooled = (2 + 1) / (5 + 10)  # the other one's ended at once; and the one that is believed at first
    assert (terms.own_ends, terms.own_per_second, terms.pooled_per_second) == (1.0, pytest.approx(1 / 5), pytest.approx(pooled))
    ever = (1 + PRIOR_ENDS) / (5 + PRIOR_ENDS / pooled)
    assert terms.per_second == pytest.approx((1 + PRIOR_ENDS) / (5 + PRIOR_ENDS / ever))
    assert (terms.idle_seconds, terms.as_long_seconds) == (0.0, (0.0, 10.0))
    assert terms.chance == forecast.chances(BEGIN + 8, 600.0)["chat"]
    assert {"hour", "weekday"} <= set(terms.seasons) and set(terms.seasons.values()) == {(1.0, False)}, "nothing is known of them"
    assert (terms.credit_nats, terms.all_credit_nats) == (0.0, 0.0)


def test_the_longest_idle_times_have_no_end_and_who_is_asked_for_is_not_idle() -> None:
    forecast = seen_once()
    long, asked = (explained(forecast, model, BEGIN + 10**7, 600.0) for model in ("chat", "other"))
    assert long is not None and asked is not None
    assert (long.as_long_seconds[1], long.own_ends, long.idle_seconds) == (None, 0.0, 10**7 - 8)
    assert (asked.chance, asked.idle_seconds) == (1.0, 0.0)
    assert explained(forecast, "nobody", BEGIN, 600.0) is None


def test_what_it_was_better_by() -> None:
    forecast = seen_once()
    for minute in range(1, 30):
        forecast.judge(BEGIN + 8 + minute * STATEMENT_SECONDS)
    at = BEGIN + 8 + 30 * STATEMENT_SECONDS
    terms = explained(forecast, "chat", at, 600.0)
    assert terms is not None and terms.credit_nats != 0.0
    assert forecast.is_worth_it("chat") == (terms.credit_nats > 0) and forecast.is_worth_it() == (terms.all_credit_nats > 0)
