"""What a source of demand is, and what it may say.

A source is asked again and again, by one task of its own (watch.py), which has a deadline for it. It answers with a number of requests or
raises, and never turns what it does not understand into a zero: for those who scale by it, zero means that nobody asks.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from scaler.gateway.upstream import Endpoint
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_MOST = 1e9  # more requests than any queue has: whoever says so is wrong


class SourceError(Exception):
    """A source could not be read, or what it said is of no use. The message says what it said, and what to do where that is known."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a source says of one moment: requests that are pending, or a number of replicas that are to be there whatever is pending.

    again_seconds: when it is to be read again, at the latest; None: after its interval.
    """

    pending: int = 0
    replicas: int = 0
    again_seconds: float | None = None


class Source(Protocol):
    """One that is open."""

    async def read(self) -> Reading:
        """What it says now. It may take as long as it takes: whoever reads gives up. Raises: SourceError."""

    async def close(self) -> None:
        """Gives back what it holds."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A replica that the gateway sends requests to. in_flight: how many it has at it now."""

    id: str
    endpoint: Endpoint
    in_flight: Callable[[], int] = field(compare=False)


class Tally(Protocol):
    """Of one model, from the moment on that it was begun."""

    async def most(self) -> int:
        """The most requests that all other gateways can have had in flight at any moment until now. Raises: SourceError: not known."""


class Alone:
    """There is no other gateway."""

    async def most(self) -> int:
        return 0


Lookup = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a source may need of the program that it is in. clock: for what is about time; engines: those of a model; others: begins a tally
    of what other gateways have at them.

    lookup: the addresses of a URL's host, or SourceError where it may not be asked; None: as the system has them.
    """

    clock: Clock = SYSTEM_CLOCK
    engines: Callable[[str], Sequence[Engine]] = lambda _: ()
    lookup: Lookup | None = None
    others: Callable[[str], Tally] = lambda _: Alone()


class Declaration(BaseModel):
    """What a user writes of a source: what it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: str

    @property
    def every_seconds(self) -> float | None:
        """From one reading to the next; None: it is not read, but tells by itself."""
        return None

    @property
    def says(self) -> str:
        """What it is of, for people: no secret is in it."""
        raise NotImplementedError

    @property
    def flaw(self) -> str:
        """Why it is never asked; empty: it is."""
        return ""

    def beside(self, folder: Path) -> Self:
        """With paths that count from `folder`, where they are relative."""
        return self

    def open(self, model: str, around: Surroundings) -> Source:
        """For one that is read."""
        raise NotImplementedError


class Polled(Declaration):
    """One whose user says how often it is read."""

    interval_seconds: Annotated[float, Field(ge=0.1, le=3600)]

    @property
    def every_seconds(self) -> float:
        return self.interval_seconds


class Refused(Declaration):
    """One that its user may not have, or that cannot be understood. It is as unknown as a silent one: it was meant to say something."""

    why: str

    @property
    def says(self) -> str:
        return "refused"

    @property
    def flaw(self) -> str:
        return self.why


def whole(value: float, said: str) -> int:
    """A number of requests, rounded up. said: the number as it was said. Raises: SourceError: it is none that a queue can have."""
    if not 0 <= value <= _MOST:  # NaN is neither
        raise SourceError(f"{said} is no number of requests: it must be between 0 and {_MOST:g}")
    return math.ceil(round(value, 6))


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{value.rpartition('@')[2]!r} is no URL such as http://prometheus.example:9090")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL has a user in it: leave it out")
    return value.rstrip("/")


HttpUrl = Annotated[str, AfterValidator(_http_url)]
