"""The dispatcher: which replicas there are, and which request is served by which.

Every model has a pool: its replicas, each with `concurrency` places, and the line of requests that are held because no place is free. A
request takes a place at once or joins the line; whenever a place comes free (a request ended, a replica was added, the limits were
raised) the pool hands places out until either runs out. Nothing polls: a held request waits on one future, and the hand-over happens
inside the call that freed the place.

A replica that failed a request before its first byte is *suspect*: it gets no requests until it accepts a connection again, tried at once
(an engine that closed an idle connection under us is back in a millisecond) and then ever less often, until the agent reports it gone.
Rejected: excluding it for the one retried request only, because then every other held request would burn its own retry on the dead
replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from scaler.books.fairness import FairQueue, Priority
from scaler.books.ledger import Ledger, QueueFull
from scaler.gateway.upstream import Endpoint, Upstream
from zerowake_shared.backoff import Backoff

__all__ = ["Backend", "Dispatcher", "Endpoint", "Hold", "Member", "NoReplica"]

log = logging.getLogger(__name__)

_PROBE_FIRST_SECONDS = 0.05
_PROBE_LAST_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Backend:
    """One replica as the gateway reaches it. What else is known of it is the plan's (plan/world.py)."""

    id: str
    model: str
    endpoint: Endpoint


class NoReplica(Exception):
    """A held request was not served: no replica in time, the model was withdrawn, or the gateway is closing."""


class Member:
    """A replica in its pool, with the connections to it."""

    __slots__ = ("backend", "draining", "gone", "idle", "in_flight", "pool", "probe", "upstream")

    def __init__(self, backend: Backend, pool: _Pool) -> None:
        self.backend = backend
        self.pool = pool
        self.upstream = Upstream(backend.endpoint)
        self.in_flight = 0
        self.draining = False
        self.gone = False
        self.probe: asyncio.Task[None] | None = None  # there is one while the replica is suspect
        self.idle: asyncio.Event | None = None  # made by the first drain


class Hold:
    """A held request's place in the line. `future` gives the member that serves it, or NoReplica."""

    __slots__ = ("future", "pool", "priority", "size", "tenant", "timer", "waiting")

    def __init__(self, pool: _Pool, tenant: str, priority: Priority, size: int) -> None:
        self.pool = pool
        self.tenant = tenant
        self.priority = priority
        self.size = size
        self.future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.waiting = True


class _Pool:
    """One model's replicas, and the line of requests that none of them has a place for."""

    __slots__ = ("line", "members", "model")

    def __init__(self, model: str) -> None:
        self.model = model
        self.members: dict[str, Member] = {}
        self.line: FairQueue[Hold] = FairQueue()


class Dispatcher:
    """Gives every request its replica, or its place in the line: all pools. One event loop; only `drain` and `close` wait."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pools: dict[str, _Pool] = {}
        self._members: dict[str, Member] = {}
        self._closing: set[asyncio.Task[None]] = set()
        ledger.on_declaration(self._declared)

    def add(self, backend: Backend) -> None:
        """The replica is ready: held requests go to it at once. The same one again changes nothing; another of its id replaces it."""
        known = self._members.get(backend.id)
        if known is not None:
            if known.backend == backend:
                return
            self.remove(backend.id)
        pool = self._pool(backend.model)
        member = Member(backend, pool)
        pool.members[backend.id] = self._members[backend.id] = member
        self._count(pool)
        self._serve(pool)

    def remove(self, replica_id: str) -> None:
        """The replica is gone: its connections are closed. An unknown id changes nothing."""
        member = self._members.pop(replica_id, None)
        if member is None:
            return
        member.gone = True
        del member.pool.members[replica_id]
        if member.probe is not None:
            member.probe.cancel()
        if member.idle is not None:
            member.idle.set()
        self._background(member.upstream.close())
        self._count(member.pool)

    def retire(self, replica_id: str) -> None:
        """The replica gets no new requests, and finishes those that it has. An unknown id changes nothing."""
        member = self._members.get(replica_id)
        if member is not None:
            member.draining = True
            self._count(member.pool)

    def resume(self, replica_id: str) -> None:
        """A retired replica takes requests again. An unknown id changes nothing."""
        member = self._members.get(replica_id)
        if member is not None and member.draining:
            member.draining = False
            self._count(member.pool)
            self._serve(member.pool)

    async def drain(self, replica_id: str) -> None:
        """Retires the replica; returns when it works on none or is gone. Deadline and removal are the caller's."""
        self.retire(replica_id)
        member = self._members.get(replica_id)
        if member is not None and member.in_flight:
            if member.idle is None:
                member.idle = asyncio.Event()
            await member.idle.wait()

    def ready(self, model: str) -> Sequence[Backend]:
        """The model's replicas that take requests."""
        pool = self._pools.get(model)
        return [member.backend for member in pool.members.values() if not member.draining] if pool is not None else []

    def in_flight(self, replica_id: str) -> int:
        """Requests the replica works on; 0 for an unknown one."""
        member = self._members.get(replica_id)
        return member.in_flight if member is not None else 0

    def take(self, model: str) -> Member | None:
        """A place on a replica at once, or None: then the request has to be held. Raises: UnknownModel."""
        concurrency = self._ledger.limits(model).concurrency
        pool = self._pools.get(model)
        if pool is None or pool.line:
            return None
        member = _free(pool, concurrency)
        if member is not None:
            member.in_flight += 1
            self._ledger.start(model)
        return member

    def hold(self, model: str, tenant: str, priority: Priority, size: int, *, arrived: float | None = None, again: bool = False) -> Hold:
        """Joins the line with a body of `size` bytes, for at most the model's `max_wait_seconds`.

        arrived: when the request came; None: now. again: the request had its place and its replica failed; it goes ahead of later ones and
        no bound applies to it.
        Raises: UnknownModel, QueueFull.
        """
        seconds = self._ledger.limits(model).max_wait_seconds
        pool = self._pool(model)
        hold = Hold(pool, tenant, priority, size)
        pool.line.push(hold, tenant, priority, first=again)
        try:
            self._ledger.hold(model, size, bounded=not again, arrived=arrived)
        except QueueFull:
            pool.line.remove(hold, tenant, priority)
            raise
        hold.timer = hold.future.get_loop().call_later(seconds, self._expire, hold, seconds)
        return hold

    def leave(self, hold: Hold) -> None:
        """The held request no longer waits: its client left. A place that it was handed meanwhile goes to the next one."""
        if hold.waiting:
            hold.pool.line.remove(hold, hold.tenant, hold.priority)
            self._settle(hold)
            self._ledger.leave(hold.pool.model, hold.size)
        elif hold.future.done() and not hold.future.cancelled() and hold.future.exception() is None:
            self.release(hold.future.result())

    def release(self, member: Member) -> None:
        """The replica has ended its work on a request, well or not."""
        self._ledger.end(member.pool.model)
        member.in_flight -= 1
        if member.in_flight == 0 and member.idle is not None:
            member.idle.set()
        self._serve(member.pool)

    def failed(self, member: Member, error: BaseException) -> None:
        """The replica failed a request before its first byte: it gets no more until it accepts a connection. Its place is still taken."""
        if member.gone or member.probe is not None:
            return
        log.warning(
            "a replica failed a request before its first byte; it gets no more until it accepts a connection",
            extra={"fields": {"model": member.pool.model, "replica": member.backend.id, "error": f"{type(error).__name__}: {error}"}},
        )
        member.probe = self._background(self._probe(member))

    def refuse_held(self, reason: str) -> None:
        """Every held request is refused, for the reason given."""
        for pool in self._pools.values():
            self._refuse(pool, reason)

    async def close(self) -> None:
        """Removes every replica and returns when all connections are closed."""
        for replica_id in list(self._members):
            self.remove(replica_id)
        if self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _pool(self, model: str) -> _Pool:
        pool = self._pools.get(model)
        if pool is None:
            pool = self._pools[model] = _Pool(model)
        return pool

    def _count(self, pool: _Pool) -> None:
        ready = sum(not member.draining for member in pool.members.values())
        self._ledger.set_replicas(pool.model, ready, len(pool.members))

    def _serve(self, pool: _Pool) -> None:
        if not pool.line:
            return
        concurrency = self._ledger.limits(pool.model).concurrency
        while pool.line:
            member = _free(pool, concurrency)
            if member is None:
                return
            hold = pool.line.pop()
            self._settle(hold)
            if hold.future.done():  # cancelled in this very turn of the loop; its task has not run yet
                self._ledger.leave(pool.model, hold.size)
                continue
            member.in_flight += 1
            self._ledger.hand_over(pool.model, hold.size)
            hold.future.set_result(member)

    def _settle(self, hold: Hold) -> None:
        hold.waiting = False
        if hold.timer is not None:
            hold.timer.cancel()
            hold.timer = None

    def _expire(self, hold: Hold, seconds: float) -> None:
        if not hold.waiting:
            return
        model = hold.pool.model
        last = self._ledger.failure(model)
        self.leave(hold)
        if not hold.future.done():
            why = (
                f"the last try to make one failed: {last}"
                if last
                else "none has failed to start so far, the model may need longer than that"
            )
            hold.future.set_exception(NoReplica(f"no replica of model {model!r} was free within {seconds:g} s; {why}"))

    def _refuse(self, pool: _Pool, reason: str) -> None:
        while pool.line:
            hold = pool.line.pop()
            self._settle(hold)
            self._ledger.leave(pool.model, hold.size)
            if not hold.future.done():
                hold.future.set_exception(NoReplica(reason))

    def _declared(self, model: str) -> None:
        pool = self._pools.get(model)
        if pool is None:
            return
        if self._ledger.knows(model):
            self._serve(pool)
        else:
            self._refuse(pool, f"model {model!r} was withdrawn")

    async def _probe(self, member: Member) -> None:
        backoff = Backoff(_PROBE_FIRST_SECONDS, _PROBE_LAST_SECONDS)
        while True:
            try:
                await member.upstream.probe()
                break
            except OSError:
                await asyncio.sleep(backoff.next())
        member.probe = None
        self._serve(member.pool)

    def _background(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task


def _free(pool: _Pool, concurrency: int) -> Member | None:
    """The least busy member with a free place."""
    best: Member | None = None
    fewest = concurrency
    for member in pool.members.values():
        if member.in_flight < fewest and not member.draining and member.probe is None:
            best, fewest = member, member.in_flight
    return best
