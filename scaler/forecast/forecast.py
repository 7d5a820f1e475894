"""What is to be expected of every model: the chance that it is asked for, while it is idle, from what its idle times were like so far.

A model is idle from the end of its last request to the beginning of the next one. How an idle time is likely to go on is in idle_times.py;
that holds for the model's own idle times, shrunk towards those of all models, and beats rates over any window, the same hour yesterday, and
learned models with all of these as inputs. Where it helps, a time of the day and a weekday count on top (seasons.py).

It judges itself. Once a minute it states of each idle model how likely a request is within that minute, and what it had stated before is
held against what happened, beside what the model's mean rate would have said (score.py). Both are sums of log losses, so their difference
says how much likelier the forecast made what happened. Kept within bounds, that difference forgets: a forecast that was good for a year
and is not any more has lost its credit within days.

Events come one by one and cost a dictionary's look-up; numbers are worked out for all models at once, when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scaler.forecast.idle_times import BINS, PRIOR_ENDS, bins_of, expected_ends, forget, hazards, pooled, seconds_in_bins
from scaler.forecast.score import Score, judged, losses, within_bounds
from scaler.forecast.seasons import SEASONS, factors
from scaler.forecast.table import Bools, Floats, Rows, Table

STATEMENT_SECONDS = 60.0
_SET_BACK_SECONDS = 60.0  # by less than that, events may come out of their order
_PIECE, _WEEK = 1800.0, 7 * 86_400.0  # seconds
_EVENTS = 4096  # taken together before they are counted, at most
_NEVER = math.inf
_EVEN_ODDS = math.log(2.0)  # so many requests are expected by the moment by which one has come as likely as not
_LOOKS = (0.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14_400.0, 21_600.0)  # seconds; in between all is even

ROW = np.dtype(
    [
        ("since", "f8"),  # idle since then; never: it has demand
        ("came", "f8"),  # the first request since the statement; never: none
        ("ended", "f8", BINS),  # how many idle times ended in each bin
        ("seconds", "f8", BINS),  # that those spent in each
        ("lately_ended", "f8", BINS),  # the same of the latest ones above all
        ("lately_seconds", "f8", BINS),
        ("stated", "f8"),  # the chance of a request by the last statement; not a number: nothing was stated
        ("stated_plain", "f8"),  # what that would have been without seasons, and by the mean rate
        ("stated_baseline", "f8"),
        ("credit", "f8"),  # nats by which the forecast was better than the baseline, within bounds
        *(field for season in SEASONS for field in season.fields),
    ]
)


@dataclass(frozen=True, slots=True)
class State:
    """All that a forecast knows at a moment. rows: of ROW, one for each of the models, in their order."""

    models: tuple[str, ...]
    rows: Rows
    score: Score
    stated_at: float
    latest: float


class Forecast:
    """The chance of a request, for many models at once. Times are wall-clock seconds since 1970.

    A model is known from `declare` to `withdraw`; of another one nothing is taken. A clock that is set back is followed: what was idle for
    an hour by then still is.
    """

    def __init__(self) -> None:
        blank = np.zeros((), ROW)
        blank["came"], blank["stated"] = _NEVER, math.nan
        self._table = Table(blank)
        self._ends: list[tuple[int, float]] = []  # idle times that ended: the model's place, seconds
        self._latest = -math.inf
        self._stated_at = -math.inf
        self._score = Score()

    @classmethod
    def restored(cls, state: State, at: float) -> Forecast:
        """As it was. What had demand is idle from now on: requests do not outlive the program that held them."""
        forecast = cls()
        for model in state.models:
            forecast._table.add(model)
        rows = forecast._table.rows
        rows[:] = state.rows
        forecast._score, forecast._stated_at = state.score, state.stated_at
        forecast._latest = state.latest
        forecast._look_at_clock(at)
        rows["since"] = np.where(rows["since"] < _NEVER, rows["since"], at)
        if at > forecast._stated_at + STATEMENT_SECONDS:
            rows["stated"] = math.nan  # nobody was there to see what came
        return forecast

    def adopt(self, state: State, at: float) -> None:
        """What another one knows, in the place of what was seen here. What has demand here still has; models that it does not know stay."""
        known = Forecast.restored(state, at)
        self._count_ends()
        for model, row in zip(self._table.models, self._table.rows, strict=True):
            if (place := known._table.place(model)) is None:
                place = known._table.add(model)
                known._table.rows[place] = row
            elif row["since"] == _NEVER:
                known.began(model, at)
        known._count_ends()
        self._table, self._score, self._stated_at, self._latest = known._table, known._score, known._stated_at, known._latest

    def state(self) -> State:
        """A copy, which does not change any more."""
        self._count_ends()
        return State(tuple(self._table.models), self._table.rows.copy(), self._score, self._stated_at, self._latest)

    @property
    def models(self) -> list[str]:
        return list(self._table.models)

    # --- what happens

    def declare(self, model: str, at: float) -> None:
        """It is known from now on, and idle. One that is known already stays as it is."""
        self._look_at_clock(at)
        if self._table.place(model) is None:
            place = self._table.add(model)
            self._table.rows["since"][place] = at

    def withdraw(self, model: str) -> None:
        """It is forgotten, with all that was seen of it."""
        if self._table.place(model) is not None:
            self._count_ends()
            self._table.remove(model)

    def began(self, model: str, at: float) -> None:
        """It comes to have demand."""
        place = self._table.place(model)
        self._look_at_clock(at)
        if place is not None and (since := float(self._table.rows["since"][place])) != _NEVER:
            row = self._table.rows[place]
            row["since"] = _NEVER
            row["came"] = min(at, row["came"])
            self._ends.append((place, max(at - since, 0.0)))
            if len(self._ends) >= _EVENTS:
                self._count_ends()

    def ended(self, model: str, at: float) -> None:
        """Its last request has ended. One that is idle already is so from now on: what has begun was not told."""
        place = self._table.place(model)
        self._look_at_clock(at)
        if place is not None:
            self._table.rows["since"][place] = at

    # --- what is to be expected

    def chances(self, at: float, within: float) -> dict[str, float]:
        """Of each model, the probability of a request within so many seconds from `at` on; 1 for one that has demand."""
        ends = np.zeros(len(self._table.models))
        seen, idle = hazards(*self._seen(at)), self._idle_seconds(at)
        for begin, end in _pieces(at, within):
            by_then = idle + (begin - at)
            ends += expected_ends(seen, by_then, end - begin) * factors(self._table.rows, begin, by_then)
        chances = np.where(self._idle(), -np.expm1(-ends), 1.0)
        return dict(zip(self._table.models, chances.tolist(), strict=True))

    def next_likely(self, at: float) -> dict[str, float | None]:
        """Of each model, the seconds from `at` on by which a request has come as likely as not; 0: it has demand; None: not within six
        hours."""
        idle, ends = self._idle_seconds(at), np.zeros(len(self._table.models))
        seen, found = hazards(*self._seen(at)), np.where(self._idle(), math.inf, 0.0)
        for begin, end in pairwise(_LOOKS):
            more = expected_ends(seen, idle + begin, end - begin) * factors(self._table.rows, at + begin, idle + begin)
            here = np.isinf(found) & (ends + more >= _EVEN_ODDS)
            found[here] = begin + (end - begin) * (_EVEN_ODDS - ends[here]) / more[here]
            ends += more
        return {name: None if math.isinf(each) else each for name, each in zip(self._table.models, found.tolist(), strict=True)}

    def hazards(self, at: float) -> tuple[list[str], Floats]:
        """Of each model, the requests that are to be expected a second at that moment; of one that has demand, as if it had just ended."""
        idle = self._idle_seconds(at)
        bins = bins_of(idle)
        of_all, *seen = self._seen(at)
        now = np.arange(len(idle)), bins
        rates = hazards(of_all[bins], *(numbers[now] for numbers in seen)) * factors(self._table.rows, at, idle)
        return list(self._table.models), rates

    # --- what it was worth

    @property
    def score(self) -> Score:
        """Of all statements so far, those of models that were withdrawn since among them."""
        return self._score

    def is_worth_it(self, model: str = "") -> bool:
        """Whether it was better than the mean rate of late: for that model, or for all together. Not so before it has shown it."""
        credits, place = self._table.rows["credit"], self._table.place(model)
        credit = credits.sum() if not model else credits[place] if place is not None else 0.0
        return bool(credit > 0.0)

    @property
    def credits(self) -> dict[str, float]:
        """Of each model, the nats by which the forecast was better than its mean rate of late; kept within bounds."""
        return dict(zip(self._table.models, self._table.rows["credit"].tolist(), strict=True))

    @property
    def seasonal(self) -> dict[str, int]:
        """For how many models each season counts (seasons.py)."""
        return {season.name: int(season.counting(self._table.rows).sum()) for season in SEASONS}

    def judge(self, at: float) -> None:
        """Holds what it has stated against what happened, once that minute is over, and states anew: to be called each minute."""
        self._look_at_clock(at)
        if at < self._stated_at + STATEMENT_SECONDS:
            return
        rows = self._table.rows
        stated = ~np.isnan(rows["stated"])
        came = rows["came"][stated] <= self._stated_at + STATEMENT_SECONDS
        chances, plain, baseline = (rows[name][stated] for name in ("stated", "stated_plain", "stated_baseline"))
        loss, baseline_loss = losses(chances, came), losses(baseline, came)
        self._score += judged(chances, came, loss, baseline_loss)
        rows["credit"][stated] = within_bounds(rows["credit"][stated] + baseline_loss - loss)
        if stated.any():
            for season in SEASONS:
                season.learn(rows, self._stated_at, stated, plain, came)
        self._state(at)

    # --- how

    def _state(self, at: float) -> None:
        rows, idle = self._table.rows, self._idle_seconds(at)
        ends = expected_ends(hazards(*self._seen(at)), idle, STATEMENT_SECONDS)
        rows["stated_plain"] = -np.expm1(-ends)
        rows["stated_baseline"] = self._baseline(at)
        for season in SEASONS:
            season.state(rows, at, idle, ends)
        rows["stated"] = np.where(self._idle(), -np.expm1(-ends * factors(rows, at, idle)), math.nan)
        rows["came"] = _NEVER
        self._stated_at = at

    def _idle(self) -> Bools:
        idle: Bools = self._table.rows["since"] < _NEVER
        return idle

    def _idle_seconds(self, at: float) -> Floats:
        return np.maximum(at - self._table.rows["since"], 0.0)

    def _seen(self, at: float) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """What the hazards are made of: that of all, and of each model in each bin ends and seconds, ever and lately."""
        self._count_ends()
        rows, lasting = self._table.rows, seconds_in_bins(self._idle_seconds(at))
        ended, seconds = rows["ended"], rows["seconds"] + lasting
        return pooled(ended, seconds), ended, seconds, rows["lately_ended"], rows["lately_seconds"] + lasting

    def _baseline(self, at: float) -> Floats:
        """The chance of a request within the minute by each model's mean rate while it is idle, shrunk just as its hazards are."""
        self._count_ends()
        ended, seconds = self._table.rows["ended"].sum(axis=1), self._table.rows["seconds"].sum(axis=1) + self._idle_seconds(at)
        of_all = (ended.sum() + 1.0) / (seconds.sum() + STATEMENT_SECONDS)
        rates: Floats = (ended + PRIOR_ENDS) / (seconds + PRIOR_ENDS / of_all)
        return -np.expm1(-STATEMENT_SECONDS * rates)

    def _count_ends(self) -> None:
        if not self._ends:
            return
        places = np.array([place for place, _ in self._ends])
        idle = np.array([seconds for _, seconds in self._ends])
        self._ends.clear()
        rows = self._table.rows
        bins, spent = bins_of(idle), seconds_in_bins(idle)
        for ended, seconds in (("ended", "seconds"), ("lately_ended", "lately_seconds")):
            np.add.at(rows[ended], (places, bins), 1.0)
            np.add.at(rows[seconds], places, spent)
        forget(rows["lately_ended"], rows["lately_seconds"])

    def _look_at_clock(self, at: float) -> None:
        if at < self._latest - _SET_BACK_SECONDS:
            back = self._latest - at
            self._table.rows["since"] -= back
            self._table.rows["came"] -= back
            self._stated_at -= back
            self._latest = at
        else:
            self._latest = max(at, self._latest)


def _pieces(at: float, within: float) -> Iterator[tuple[float, float]]:
    """The time from `at` on, cut where a half hour ends: in each piece factors are those of its beginning. After a week it is not cut."""
    begin, end = at, at + within
    while begin < end:
        following = (begin // _PIECE + 1) * _PIECE if begin < at + _WEEK else end
        yield begin, min(following, end)
        begin = following
