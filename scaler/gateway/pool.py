"""One model's pool: its replicas, and the line of requests that none of them has a place for."""

from __future__ import annotations

import asyncio

from scaler.books.fairness import FairQueue, Priority
from scaler.gateway.member import Member
from scaler.gateway.places import Places


class NoReplica(Exception):
    """A held request was not served: no replica in time, the model was withdrawn, or the gateway is closing."""


class Hold:
    """A held request's place in the line. `future` gives the member that serves it, or NoReplica."""

    __slots__ = ("future", "pool", "priority", "size", "tenant", "timer", "waiting")

    def __init__(self, pool: Pool, tenant: str, priority: Priority, size: int) -> None:
        self.pool = pool
        self.tenant = tenant
        self.priority = priority
        self.size = size
        self.future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.waiting = True

    def settle(self) -> None:
        """It is in the line no more."""
        self.waiting = False
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Pool:
    """The members of a model, by id, and its line."""

    __slots__ = ("has_slept", "line", "members", "model")

    def __init__(self, model: str) -> None:
        self.model = model
        self.has_slept = False  # a replica of it has slept once
        self.members: dict[str, Member] = {}
        self.line: FairQueue[Hold] = FairQueue()

    @property
    def ready(self) -> int:
        """Members that may be counted on for requests."""
        return sum(not (member.draining or member.unready) for member in self.members.values())

    @property
    def unreachable(self) -> int:
        """Members at which nothing answers, of those that are wanted."""
        return sum(member.unreachable and not member.draining for member in self.members.values())

    def free(self, places: Places, concurrency: int) -> Member | None:
        """The least busy member with a free place."""
        best: Member | None = None
        for member in self.members.values():
            if (best is not None and member.in_flight >= best.in_flight) or not member.takes_requests:
                continue
            if places.room(member.backend.id, concurrency, member.in_flight) > 0:
                best = member
        return best
