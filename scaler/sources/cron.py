"""Demand by the calendar, as KEDA's cron scaler has it: between `start` and `end` there is to be a number of replicas.

It is active while its next end comes before its next start, which is KEDA's rule, and reads no more than a clock: its value is never old.
The clock may be set, so it is asked once a minute at least. Expressions are those of Debian's cron, by cronsim, summer time included: an
hour that is skipped or comes twice is treated as there. Rejected: croniter, whose expressions have seconds, years and chance besides.
"""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Annotated, Literal, Self

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, model_validator

from scaler.sources.source import Declaration, Reading, Surroundings
from zerowake_shared.clock import Clock

_LOOK_SECONDS = 60.0
_AFTER_SECONDS = 0.001  # so that a timer that comes a little early does not find the moment before


def _zone(value: str) -> str:
    try:
        zoneinfo.ZoneInfo(value)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{value!r} is no time zone that this machine knows, such as Europe/Zurich or UTC") from None
    return value


def _expression(value: str) -> str:
    try:
        next(CronSim(value, datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)))
    except (CronSimError, StopIteration) as error:
        raise ValueError(f"{value!r} is no expression of cron, such as 0 8 * * 1-5: {error or 'it never comes true'}") from None
    return value


Expression = Annotated[str, AfterValidator(_expression)]


class CronDeclaration(Declaration):
    """timezone: of the IANA's; start, end: when it begins and ends, as cron has it; desired: replicas meanwhile."""

    type: Literal["cron"]
    timezone: Annotated[str, AfterValidator(_zone)]
    start: Expression
    end: Expression
    desired: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.start == self.end:
            raise ValueError(f"start and end are both {self.start!r}: there is no time between them")
        return self

    @property
    def every_seconds(self) -> float:
        return _LOOK_SECONDS

    @property
    def says(self) -> str:
        return f"{self.start} to {self.end}, {self.timezone}"

    def open(self, model: str, around: Surroundings) -> Cron:
        return Cron(self, around.clock)


class Cron:
    def __init__(self, declared: CronDeclaration, clock: Clock) -> None:
        self._declared = declared
        self._zone = zoneinfo.ZoneInfo(declared.timezone)
        self._clock = clock

    async def read(self) -> Reading:
        wall = self._clock.wall()
        now = datetime.datetime.fromtimestamp(wall, self._zone)
        start, end = (next(CronSim(each, now)).timestamp() for each in (self._declared.start, self._declared.end))
        again = min(min(start, end) - wall + _AFTER_SECONDS, _LOOK_SECONDS)
        return Reading(replicas=self._declared.desired if end <= start else 0, again_seconds=again)

    async def close(self) -> None:
        """It holds nothing."""
