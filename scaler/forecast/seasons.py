"""By how much a model is likelier to be asked for at this time of the day, or on this weekday, than its idle times alone would say.

The factor of an hour is the number of requests that came in it, by the number that the idle times had made expect; a fraction of one is
added to both, so that it is 1 until there is something to tell. What it was multiplied to is compared, minute for minute, with what it
would have been without: only where that was better by far, for this very model, does the factor count. Of models whose requests come at
any hour it would learn nothing but noise. An hour learns when it is over, so that a busy hour does not pass for a busy time of day. Hours
and days are those of UTC: a pattern of some other place is as regular there, but for two days a year.

A model that was just asked for, and one that has been idle for long, have factors of their own. In a busy hour nearly all requests follow
another one closely, which the idle times foretell by themselves: counted together they made a factor of about 1, and the first request of
a model's day was missed. Long idle ones have half hours, with half of each neighbour, so that what comes early today is there.
Rejected: one factor for each hour of the week (seven times as many weeks until it says anything).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaler.forecast.score import losses, within_bounds
from scaler.forecast.table import Bools, Floats, Rows

_LONG_IDLE = 2430.0  # seconds, with which a bin of idle times ends (idle_times.py)
_OWN_WEIGHT = 0.1  # requests that are believed to have come as expected, before any did
_KEPT = 1 - 1 / 28  # of what was seen in a part, each time that it comes again
_ENOUGH_CREDIT = 2.0  # nats: with the factor, what happened was seven times likelier than without
_EPOCH_WEEKDAY = 3  # 1970 began on a Thursday


@dataclass(frozen=True)
class Season:
    """A part of time that comes again and again. name: of its columns; parts: into how many it is divided, each `seconds` long."""

    name: str
    parts: int
    seconds: float
    first: int = 0  # the part in which 1970 began
    idle_from: float = 0.0  # it concerns models that have been idle for so many seconds
    idle_to: float = math.inf
    around: tuple[float, ...] = (1.0,)  # how much of the parts around a part counts for it, from the one before on

    @property
    def fields(self) -> list[tuple[Any, ...]]:
        """The columns that a table needs for it."""
        return [
            (f"{self.name}_came", "f4", self.parts),  # requests
            (f"{self.name}_due", "f4", self.parts),  # those that were to be expected without the factor
            (f"{self.name}_visit", "f8"),  # which part it is now, counted from 1970
            (f"{self.name}_now", "f4", 2),  # came and due in that
            (f"{self.name}_stated", "f8"),  # the chance of a request by the last statement, had the factor counted
            (f"{self.name}_credit", "f8"),  # nats by which that was better than without, within bounds
            (f"{self.name}_counts", "?"),  # the factor counts
        ]

    def part(self, at: float) -> int:
        return int(at // self.seconds + self.first) % self.parts

    def concerns(self, idle: Floats) -> Bools:
        """Which models, by the seconds that each has been idle."""
        found: Bools = (idle >= self.idle_from) & (idle < self.idle_to)
        return found

    def factors(self, rows: Rows, at: float) -> Floats:
        """Of each model, whether it counts or not, and whether it concerns it: above 0."""
        parts = (self.part(at) + np.arange(len(self.around)) - len(self.around) // 2) % self.parts
        came, due = (rows[f"{self.name}_{what}"][:, parts] @ np.array(self.around) for what in ("came", "due"))
        found: Floats = (came + _OWN_WEIGHT) / (due + _OWN_WEIGHT)
        return found

    def counting(self, rows: Rows) -> Bools:
        counts: Bools = rows[f"{self.name}_counts"]
        return counts

    def state(self, rows: Rows, at: float, idle: Floats, ends: Floats) -> None:
        """Notes what would be stated at that moment if the factor counted. idle: seconds so far; ends: that are expected within the
        minute without it.
        """
        rows[f"{self.name}_stated"] = np.where(self.concerns(idle), -np.expm1(-ends * self.factors(rows, at)), math.nan)

    def learn(self, rows: Rows, at: float, judged: Bools, plain: Floats, came: Bools) -> None:
        """Takes in a minute that is over. at: when it began; judged: the models that were idle then; plain, came: for those, what was
        stated without any factor, and what happened."""
        self._learn_visits(rows, at // self.seconds)
        stated = rows[f"{self.name}_stated"]
        concerned = ~np.isnan(stated[judged])
        judged, plain, came = np.flatnonzero(judged)[concerned], plain[concerned], came[concerned]
        rows[f"{self.name}_now"][judged] += np.column_stack((came, plain))
        gain = losses(plain, came) - losses(stated[judged], came)
        credit = rows[f"{self.name}_credit"]
        credit[judged] = within_bounds(credit[judged] + gain)
        counts = rows[f"{self.name}_counts"]
        counts[:] = np.where(counts, credit > 0.0, credit > _ENOUGH_CREDIT)

    def _learn_visits(self, rows: Rows, visit: float) -> None:
        """What was seen in a part that is over by now is taken into what is known of that part."""
        over = np.flatnonzero(rows[f"{self.name}_visit"] != visit)
        if not len(over):
            return
        parts = (rows[f"{self.name}_visit"][over].astype(np.int64) + self.first) % self.parts
        now = rows[f"{self.name}_now"]
        for place, what in enumerate(("came", "due")):
            known = rows[f"{self.name}_{what}"]
            known[over, parts] = known[over, parts] * _KEPT + now[over, place]
        now[over] = 0.0
        rows[f"{self.name}_visit"][over] = visit


SEASONS = (
    Season("hour", 24, 3600.0, idle_to=_LONG_IDLE),
    Season("return", 48, 1800.0, idle_from=_LONG_IDLE, around=(0.5, 1.0, 0.5)),
    Season("weekday", 7, 86_400.0, _EPOCH_WEEKDAY),
)


def factors(rows: Rows, at: float, idle: Floats) -> Floats:
    """Of each model, of all seasons that count for it. idle: seconds so far."""
    found = np.ones(len(rows))
    for season in SEASONS:
        counts = season.counting(rows) & season.concerns(idle)
        if counts.any():
            found[counts] *= season.factors(rows, at)[counts]
    return found
