"""Chances and hazards of made-up models: by hand where that can be done, and as laws where it cannot."""

from collections import deque
from math import exp, inf, isnan
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaler.forecast.forecast import STATEMENT_SECONDS, Forecast
from scaler.forecast.idle_times import PRIOR_ENDS

BEGIN = 1_800_000_000.0
DAY = 86_400.0
MODELS = st.sampled_from(["a", "b", "c", "d"])


def happens(forecast: Forecast, rhythms: dict[str, float], seconds: float, begin: float = BEGIN) -> float:
    """Models that are idle for so long each time, and then busy for a second; returns the end of all that."""
    ends = begin + seconds
    times = [(begin + n * (idle + 1) + idle, model) for model, idle in rhythms.items() for n in range(int(seconds / (idle + 1)))]
    events = [(at + after, step, model) for at, model in times for after, step in ((0, "began"), (1, "ended"))]
    for at, step, model in sorted(events):
        getattr(forecast, step)(model, at)
    return ends


def hazard(forecast: Forecast, model: str, at: float) -> float:
    models, rates = forecast.hazards(at)
    return float(rates[models.index(model)])


def test_of_what_was_seen_once() -> None:
    forecast = Forecast()
    forecast.declare("chat", BEGIN)
    forecast.began("chat", BEGIN + 5)
    forecast.ended("chat", BEGIN + 8)
    pooled = (1 + 1) / (5 + 10)  # one end in 5 s, and the one that is believed at first
    ever = (1 + PRIOR_ENDS) / (5 + PRIOR_ENDS / pooled)
    own = (1 + PRIOR_ENDS) / (5 + PRIOR_ENDS / ever)  # all that it has seen was lately
    assert hazard(forecast, "chat", BEGIN + 8) == pytest.approx(own)
    assert forecast.chances(BEGIN + 8, 4.0)["chat"] == pytest.approx(1 - exp(-4 * own))


def test_of_an_idle_time_that_lasts_its_seconds_count() -> None:
    forecast = Forecast()
    forecast.declare("chat", BEGIN)
    first, later = (hazard(forecast, "chat", BEGIN + after) for after in (1, 9))
    ever = PRIOR_ENDS / (9 + PRIOR_ENDS * (9 + 10))
    assert later == pytest.approx(PRIOR_ENDS / (9 + PRIOR_ENDS / ever))
    assert later < first


def test_one_with_demand_is_certain() -> None:
    forecast = Forecast()
    forecast.declare("chat", BEGIN)
    forecast.began("chat", BEGIN + 5)
    assert forecast.chances(BEGIN + 500, 1e-6) == {"chat": 1.0}
    assert hazard(forecast, "chat", BEGIN + 500) > 0.0


def test_when_a_request_has_come_as_likely_as_not() -> None:
    forecast = Forecast()
    for model in ("often", "seldom", "asked"):
        forecast.declare(model, 0.0)
    now = 0.0
    for _ in range(200):
        now += 100.0
        forecast.began("often", now)
        forecast.ended("often", now)
    forecast.began("asked", now)
    likely = forecast.next_likely(now)
    assert likely["asked"] == 0.0
    often = likely["often"]
    assert often is not None and 60.0 < often < 120.0
    assert forecast.chances(now, 60.0)["often"] < 0.5 < forecast.chances(now, 120.0)["often"], "in between it counts as even"
    assert likely["seldom"] is None or likely["seldom"] > 10 * often
    assert Forecast().next_likely(now) == {}


def test_no_model_no_chances() -> None:
    models, rates = Forecast().hazards(BEGIN)
    assert (models, rates.tolist(), Forecast().chances(BEGIN, 60.0)) == ([], [], {})
    Forecast().judge(BEGIN)


def test_a_model_without_a_history_has_that_of_all() -> None:
    forecast = Forecast()
    others = {f"m{number}": 20.0 for number in range(20)}
    for model in others:
        forecast.declare(model, BEGIN)
    at = happens(forecast, others, 4000)
    forecast.declare("new", at)
    assert hazard(forecast, "new", at) < 0.001, "nobody's idle time has ended within ten seconds"
    assert hazard(forecast, "new", at + 10) == pytest.approx(0.1, rel=0.1), "all have ended within the next ten"


def test_what_is_its_own_outweighs_that_of_all() -> None:
    forecast = Forecast()
    rhythms = {"often": 5.0, "seldom": 20_000.0, **{f"m{number}": 60.0 for number in range(20)}}
    for model in rhythms:
        forecast.declare(model, BEGIN)
    at = happens(forecast, rhythms, 100_000)
    for model in rhythms:
        forecast.began(model, at)
        forecast.ended(model, at)
    assert hazard(forecast, "often", at) == pytest.approx(1 / 5, rel=0.1)
    assert hazard(forecast, "often", at) > 100 * hazard(forecast, "m0", at)
    assert hazard(forecast, "seldom", at + 60) < hazard(forecast, "m0", at + 60) / 2


def test_events_that_are_told_twice_count_once() -> None:
    once, twice = Forecast(), Forecast()
    for times, forecast in ((1, once), (2, twice)):
        for _ in range(times):
            forecast.declare("chat", BEGIN)
        for _ in range(times):
            forecast.began("chat", BEGIN + 20)
        for _ in range(times):
            forecast.ended("chat", BEGIN + 30)
    assert twice.chances(BEGIN + 40, 60.0) == once.chances(BEGIN + 40, 60.0)


def test_of_models_that_are_not_known_nothing_is_taken() -> None:
    forecast = Forecast()
    forecast.began("chat", BEGIN)
    forecast.ended("chat", BEGIN)
    forecast.withdraw("chat")
    assert forecast.chances(BEGIN, 60.0) == {}
    assert not forecast.is_worth_it("chat")


def test_a_withdrawn_model_leaves_nothing_to_who_gets_its_place() -> None:
    forecast, fresh = Forecast(), Forecast()
    for model in ("stays", "goes", "last"):
        forecast.declare(model, BEGIN)
    at = happens(forecast, {"goes": 3.0, "last": 300.0}, 1000)
    forecast.judge(at)
    assert forecast.chances(at, 60.0).keys() == {"stays", "goes", "last"}
    forecast.withdraw("goes")
    for model in ("stays", "last"):
        fresh.declare(model, BEGIN)
    happens(fresh, {"last": 300.0}, 1000)
    assert forecast.chances(at, 60.0) == fresh.chances(at, 60.0)
    for each in (forecast, fresh):
        each.declare("goes", at)
    assert forecast.chances(at + 5, 60.0) == fresh.chances(at + 5, 60.0)
    forecast.judge(at + 60)
    assert forecast.score.statements == 2, "what was stated of it while it was there is not held against it now"


@given(
    st.lists(st.tuples(st.sampled_from(["declare", "withdraw", "began", "ended", "judge"]), MODELS, st.floats(-1e6, 1e6)), max_size=40),
    st.floats(-1e6, 1e7),
    st.lists(st.floats(0, 1e8), min_size=1, max_size=5),
)
@settings(deadline=None)
def test_chances_are_chances_whatever_happened(steps: list[tuple[str, str, float]], after: float, within: list[float]) -> None:
    forecast = Forecast()
    for step, model, at in steps:
        if step == "withdraw":
            forecast.withdraw(model)
        elif step == "judge":
            forecast.judge(BEGIN + at)
        else:
            getattr(forecast, step)(model, BEGIN + at)
    models, rates = forecast.hazards(BEGIN + after)
    assert ((rates > 0) & (rates < inf)).all()
    last = dict.fromkeys(models, 0.0)
    for seconds in (*sorted(within), inf):
        found = forecast.chances(BEGIN + after, seconds)
        assert found.keys() == last.keys()
        assert all(last[model] <= chance <= 1.0 and not isnan(chance) for model, chance in found.items())
        last = found
    assert set(last.values()) <= {1.0}


@pytest.mark.parametrize("back", [1.0, 3600.0, 1e8])
def test_a_clock_that_is_set_back_makes_nobody_younger(back: float) -> None:
    forecast, straight = Forecast(), Forecast()
    for each in (forecast, straight):
        each.declare("chat", BEGIN)
        each.declare("mail", BEGIN)
        happens(each, {"chat": 100.0}, 10_000)
        each.judge(BEGIN + 10_000)
    forecast.judge(BEGIN + 10_000 - back)
    moved = back if back > STATEMENT_SECONDS else 0.0  # by less it waits until time has come up again
    assert forecast.chances(BEGIN + 10_050 - moved, 60.0) == pytest.approx(straight.chances(BEGIN + 10_050, 60.0))
    for each, offset in ((forecast, moved), (straight, 0.0)):
        each.began("chat", BEGIN + 10_055 - offset)
        each.judge(BEGIN + 10_060 - offset)
    assert forecast.score == straight.score
    assert forecast.score.requests == 1


# --- what it was worth


def lives(forecast: Forecast, begins: dict[str, list[float]], until: float, begin: float = BEGIN, every: float = 60.0) -> None:
    """Judges at the end of each minute, or less often, while requests come at those times, each of them a second long."""
    events = [(at + after, step, model) for model, times in begins.items() for at in times for after, step in ((0, "began"), (1, "ended"))]
    coming = deque(sorted(events))
    for minute in np.arange(begin, until, every):
        while coming and coming[0][0] < minute:
            at, step, model = coming.popleft()
            getattr(forecast, step)(model, at)
        forecast.judge(float(minute))


def arrivals(chance: Random, gap: float, seconds: float) -> list[float]:
    """Of a memoryless stream from BEGIN on."""
    times = [BEGIN + chance.expovariate(1 / gap)]
    while times[-1] < BEGIN + seconds:
        times.append(times[-1] + 1 + chance.expovariate(1 / gap))
    return times


def test_a_statement_is_held_against_its_minute() -> None:
    forecast = Forecast()
    for model in ("asked", "late", "idle", "busy"):
        forecast.declare(model, BEGIN)
    forecast.began("busy", BEGIN)
    forecast.judge(BEGIN)
    stated = forecast.chances(BEGIN, STATEMENT_SECONDS)
    forecast.began("asked", BEGIN + 59)
    forecast.judge(BEGIN + 59.9)
    assert forecast.score.statements == 0, "the minute is not over"
    forecast.began("late", BEGIN + 61)
    forecast.judge(BEGIN + 75)
    score = forecast.score
    assert (score.statements, score.requests) == (3, 1), "nothing is stated of one that has demand"
    assert score.expected == pytest.approx(stated["asked"] + stated["late"] + stated["idle"])
    assert score.loss == pytest.approx(-np.log(stated["asked"]) - np.log(1 - stated["late"]) - np.log(1 - stated["idle"]))
    assert (score.hits, score.misses, score.false_alarms) == (1, 0, 2), "before anything is known, a request is likely"


def test_bursts_are_foretold_better_than_by_a_rate() -> None:
    forecast = Forecast()
    forecast.declare("chat", BEGIN)
    chance, begins, at = Random(1), [], BEGIN
    while at < BEGIN + 3 * DAY:
        at += 30_000 * chance.random()
        for _ in range(20):
            at += 40 + 10 * chance.random()
            begins.append(at)
    assert not forecast.is_worth_it(), "it has shown nothing"
    assert not forecast.is_worth_it("chat")
    lives(forecast, {"chat": begins}, BEGIN + 3 * DAY)
    assert forecast.score.mean_loss < 0.6 * forecast.score.mean_baseline_loss
    assert forecast.is_worth_it()
    assert forecast.is_worth_it("chat")
    assert forecast.score.hits > 10 * forecast.score.misses


def test_credit_is_lost_soon_by_who_is_not_better_any_more() -> None:
    forecast = Forecast()
    forecast.declare("chat", BEGIN)
    begins = [BEGIN + 1000.0 * number for number in range(1, 250)]
    lives(forecast, {"chat": begins}, begins[-1])
    assert forecast.is_worth_it("chat"), "of what comes each thousand seconds it knows more than how often it comes"
    now = begins[-1]
    later = [now - BEGIN + at for at in arrivals(Random(1), 1000, DAY)]
    lives(forecast, {"chat": later}, now + DAY, begin=now)
    assert not forecast.is_worth_it("chat")
    assert not forecast.is_worth_it()


def test_one_model_that_nobody_can_foretell_outweighs_not_all_others() -> None:
    forecast = Forecast()
    models = {f"m{number}": [BEGIN + 100.0 * number + 1000.0 * turn for turn in range(1, 80)] for number in range(5)}
    for model in models:
        forecast.declare(model, BEGIN)
    lives(forecast, models, BEGIN + 80_000)
    assert forecast.is_worth_it()
    now, chance = BEGIN + 80_000, Random(1)
    forecast.declare("odd", now)
    lives(forecast, {"odd": [now + at - BEGIN for at in arrivals(chance, 60, 600)]}, now + 600, begin=now)
    assert not forecast.is_worth_it("odd"), "nothing like it was seen so far"
    assert set(forecast.credits) == {*models, "odd"} and forecast.credits["odd"] < 0.0 < forecast.credits["m0"]
    assert forecast.is_worth_it("m0")
    assert forecast.is_worth_it()


# --- seasons


DAYS = 30
END = BEGIN + DAYS * DAY


def patterns() -> dict[str, list[float]]:
    """Ten models that are asked for at any time, and three for which somebody comes after six, nine and eighteen o'clock each day."""
    chance = Random(5)
    begins = {f"any{number}": arrivals(chance, 7200, DAYS * DAY) for number in range(10)}
    hours = [(BEGIN // DAY + day) * DAY + hour * 3600.0 for day in range(1, DAYS) for hour in (6, 9, 18)]
    return begins | {f"day{number}": [hour + 3600 * chance.random() for hour in hours] for number in range(3)}


def after_all(begins: dict[str, list[float]]) -> Forecast:
    """What was seen of them; to be quick, it is judged for one minute of five."""
    forecast = Forecast()
    for model in begins:
        forecast.declare(model, BEGIN)
    lives(forecast, begins, END, every=300.0)
    return forecast


@pytest.fixture(scope="module")
def seasoned() -> Forecast:
    return after_all(patterns())


def test_a_time_of_the_day_counts_where_there_is_a_daily_pattern_and_nowhere_else(seasoned: Forecast) -> None:
    rows = seasoned.state().rows["return_counts"]
    assert dict(zip(seasoned.models, rows.tolist(), strict=True)) == {model: model.startswith("day") for model in seasoned.models}
    assert seasoned.seasonal["return"] == 3


def test_it_makes_the_forecast_better(seasoned: Forecast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.forecast.forecast.factors", lambda rows, at, idle: np.ones(len(rows)))
    without = after_all(patterns())
    assert without.score.statements == seasoned.score.statements
    assert seasoned.score.loss < without.score.loss - 3 * 5.0, "of each of the three it made what happened more than 150 times likelier"


def test_what_is_expected_within_a_day_goes_from_hour_to_hour(seasoned: Forecast) -> None:
    night = END // DAY * DAY
    assert hazard(seasoned, "day0", night + 9 * 3600) > 5 * hazard(seasoned, "day0", night + 7.5 * 3600)
    before, within = (seasoned.chances(END, hours * 3600.0)["day0"] for hours in (0.9, 2.0))
    assert before < 0.5 < within


@given(within=st.lists(st.floats(0, 4 * 7 * DAY), min_size=1, max_size=5), after=st.floats(0, 7 * DAY))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_chances_with_seasons_are_chances(seasoned: Forecast, within: list[float], after: float) -> None:
    last = 0.0
    for seconds in sorted(within):
        chance = seasoned.chances(END + after, seconds)["day0"]
        assert last <= chance <= 1.0
        last = chance


def test_a_restart_keeps_seasons(seasoned: Forecast) -> None:
    at = END
    assert Forecast.restored(seasoned.state(), at).chances(at, DAY) == seasoned.chances(at, DAY)
