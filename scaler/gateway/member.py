"""A replica as the gateway has it: where it is, and what is known of the connections to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scaler.gateway.sleepers import Slumber
from scaler.gateway.upstream import Endpoint, Upstream

if TYPE_CHECKING:
    from scaler.gateway.pool import Pool


@dataclass(frozen=True, slots=True)
class Backend:
    """One replica as the gateway reaches it. What else is known of it is the plan's (plan/world.py). node: its name; empty: not known."""

    id: str
    model: str
    endpoint: Endpoint
    node: str = field(default="", compare=False)


class Member:
    """A replica in its pool, with the connections to it."""

    __slots__ = (
        "backend",
        "ending",
        "gone",
        "idle",
        "in_flight",
        "pool",
        "probe",
        "rests",
        "slumber",
        "unreachable",
        "unready",
        "upstream",
    )

    def __init__(self, backend: Backend, pool: Pool) -> None:
        self.backend = backend
        self.pool = pool
        self.upstream = Upstream(backend.endpoint)
        self.in_flight = 0
        self.rests = False  # nothing new is to be sent to it, whoever makes replicas wants it or not
        self.ending = False  # it is not wanted any more, and ends when it has no request
        self.slumber = Slumber.AWAKE
        self.gone = False
        self.probe: asyncio.Task[None] | None = None  # there is one while the replica is suspect
        self.unready = False  # a suspect that was tried, and accepted no connection
        self.unreachable = False  # nothing answers there at all
        self.idle = asyncio.Event()  # set when it came to have no request, or is gone: look again

    @property
    def asleep(self) -> bool:
        """Whether it has to be woken before it is sent anything."""
        return self.slumber is not Slumber.AWAKE

    @property
    def draining(self) -> bool:
        """Whether it only finishes what it has."""
        return self.rests or self.ending or self.asleep

    @property
    def takes_requests(self) -> bool:
        return not self.draining and self.probe is None
