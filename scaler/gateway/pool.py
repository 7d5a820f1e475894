"""One model's replicas as the gateway has them, and the requests that wait for a place on one: what the dispatcher keeps."""

from __future__ import annotations

import asyncio

from scaler.books.fairness import FairQueue, Priority
from scaler.gateway.member import Member


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


class Pool:
    """One model's replicas, and the line of requests that none of them has a place for."""

    __slots__ = ("has_slept", "line", "members", "model")

    def __init__(self, model: str) -> None:
        self.model = model
        self.has_slept = False  # a replica of it has slept once
        self.members: dict[str, Member] = {}
        self.line: FairQueue[Hold] = FairQueue()
