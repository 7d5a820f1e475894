"""The dispatcher: which replicas there are, and which request is served by which.

Every model has a pool: its replicas, each with `concurrency` places, and the line of requests that are held because no place is free. A
request takes a place at once or joins the line; whenever a place comes free (a request ended, a replica was added, the limits were
raised) the pool hands places out until either runs out. Nothing polls: a held request waits on one future, and the hand-over happens
inside the call that freed the place. How many of the places are this gateway's, `places` says: others may send to the same replicas.

A replica that failed a request before its first byte is *suspect* (suspects.py): it gets none until it accepts a connection again.

A replica goes in one of three ways, and an answer that has begun is cut by the last one only:
    retire   it takes no new requests, and is counted until somebody says that it is gone
    let_go   nobody vouches for it any more (its agent went, it is not admitted), though its engine may live: as if it were not there, but
             for the requests that it has; vouched for again, it goes on with them
    remove   its engine is gone: what it has sent is read to its end, and whoever is not told of that end by the kernel is told here
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence

from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger, QueueFull
from scaler.gateway.failed_starts import CannotStart, FailedStarts
from scaler.gateway.member import Backend, Member
from scaler.gateway.places import Places, WholeReplicas
from scaler.gateway.pool import Hold, NoReplica, Pool
from scaler.gateway.sleepers import Sleepers
from scaler.gateway.suspects import Suspects
from scaler.gateway.upstream import Endpoint
from zerowake_shared.background import told

__all__ = ["Backend", "CannotStart", "Dispatcher", "Endpoint", "Hold", "Member", "NoReplica"]

log = logging.getLogger(__name__)

_LAST_BYTES_SECONDS = 0.5  # in which the last bytes of an engine that has ended are read, and the kernel's word of its end


class Dispatcher:
    """Gives every request its replica, or its place in the line: all pools. One event loop; only `drain` and `close` wait."""

    def __init__(self, ledger: Ledger, places: Places | None = None) -> None:
        """places: of the replicas, that are this gateway's; None: all."""
        self._ledger = ledger
        self._places = places or WholeReplicas()
        self._pools: dict[str, Pool] = {}
        self._members: dict[str, Member] = {}
        self._let_go: set[Member] = set()  # that have requests still
        self._closing: set[asyncio.Task[None]] = set()
        self.suspects = Suspects(self._members.values, self._tried, self._background)
        self._sleepers = Sleepers(self._line)
        self._explain: Callable[[str], str] = lambda _: ""
        self._failed_starts = FailedStarts()
        ledger.on_declaration(self._declared)
        self._places.on_room(self._room)

    def explained_by(self, explain: Callable[[str], str]) -> None:
        """Asks `explain(model)` why there is no replica, for whoever waited for one in vain; its answer is empty where nothing is odd."""
        self._explain = explain

    def woken_by(self, wake: Callable[[Backend], None]) -> None:
        """Calls `wake(backend)` for each replica that sleeps and is wanted for a request."""
        self._sleepers.woken_by(wake)

    def wake_failed(self, replica_id: str) -> None:
        """It could not be woken: another one is. An unknown id changes nothing."""
        if (member := self._members.get(replica_id)) is not None:
            self._sleepers.failed(member)

    def wake_again(self, replica_id: str) -> None:
        """One that could not be woken has its turn again, if it sleeps still."""
        if (member := self._members.get(replica_id)) is not None:
            self._sleepers.forgiven(member)

    def members(self) -> Collection[Member]:
        """Every replica that is counted, whether it takes requests or not."""
        return self._members.values()

    def has(self, replica_id: str) -> bool:
        return replica_id in self._members

    def start_failed(self, model: str, reason: str) -> None:
        """A replica of the model could not be started, by a fault of the model. Where that is so again and again, nobody is held for it."""
        self._failed_starts.failed(model, reason, asyncio.get_running_loop().time())
        pool = self._pools.get(model)
        if pool is not None and not pool.members and (why := self._failed_starts.hopeless(model)):
            self._refuse(pool, CannotStart(why))

    def add(self, backend: Backend, *, asleep: bool = False) -> None:
        """The replica is ready: held requests go to it at once. The same one again changes nothing; another of its id replaces it.

        asleep: it has to be woken first, which is asked for as requests wait.
        """
        known = self._members.get(backend.id)
        if known is not None:
            if known.backend == backend:
                if known.asleep is not asleep:
                    self._set(known, rests=known.rests, ending=known.ending, asleep=asleep)
                return
            self.let_go(backend.id)
        pool = self._pool(backend.model)
        self._failed_starts.forget(backend.model)
        goes_on = next((each for each in self._let_go if each.backend == backend), None)
        member = goes_on or Member(backend, pool)
        self._let_go.discard(member)
        self._sleepers.is_awake(member, not asleep)
        pool.members[backend.id] = self._members[backend.id] = member
        self._count(pool)
        self._serve(pool)

    def remove(self, replica_id: str) -> None:
        """The replica's engine is gone: its connections are closed, as soon as what it has sent is read. An unknown id changes nothing."""
        for left in [each for each in self._let_go if each.backend.id == replica_id]:
            self._end(left)
        if (member := self._taken_out(replica_id)) is not None:
            self._end(member)

    def let_go(self, replica_id: str) -> None:
        """Nobody vouches for the replica, though it may live: it gets nothing new, and its connections are closed when it has finished what
        it has. Added again before that, it goes on. An unknown id changes nothing."""
        member = self._taken_out(replica_id)
        if member is None:
            return
        if not member.in_flight:
            self._end(member)
            return
        self._let_go.add(member)
        self.suspects.forget(member)
        member.upstream.close_idle()

    def retire(self, replica_id: str) -> None:
        """The replica gets no new requests, and finishes those that it has. An unknown id changes nothing."""
        if (member := self._members.get(replica_id)) is not None:
            self._set(member, rests=True, ending=member.ending)

    def give_up(self, replica_id: str) -> None:
        """The replica does not answer any more: as `retire`, and its requests whose answers have not begun are ended."""
        self.retire(replica_id)
        if (member := self._members.get(replica_id)) is not None:
            member.upstream.give_up()

    def resume(self, replica_id: str) -> None:
        """A retired replica takes requests again, unless it is being drained. An unknown id changes nothing."""
        if (member := self._members.get(replica_id)) is not None:
            self._set(member, rests=False, ending=member.ending)

    async def drain(self, replica_id: str) -> None:
        """No new requests for the replica; returns when it works on none or is gone. Deadline and removal are the caller's.

        Cancelled, it takes requests again: it was wanted after all.
        """
        member = self._members.get(replica_id)
        if member is None:
            return
        self._set(member, rests=member.rests, ending=True)
        try:
            while member.in_flight and not member.gone:
                member.idle.clear()
                await member.idle.wait()
        except asyncio.CancelledError:
            self._set(member, rests=member.rests, ending=False)
            raise

    def ready(self, model: str) -> Sequence[Backend]:
        """The model's replicas that take requests."""
        pool = self._pools.get(model)
        return [member.backend for member in pool.members.values() if not member.draining] if pool is not None else []

    def in_flight(self, replica_id: str) -> int:
        """Requests the replica works on; 0 for an unknown one."""
        members = [self._members.get(replica_id), *(each for each in self._let_go if each.backend.id == replica_id)]
        return sum(member.in_flight for member in members if member is not None)

    @property
    def works(self) -> bool:
        """Whether any replica works on a request."""
        return any(member.in_flight for member in (*self._members.values(), *self._let_go))

    def take(self, model: str) -> Member | None:
        """A place on a replica at once, or None: then the request has to be held. Raises: UnknownModel."""
        concurrency = self._ledger.limits(model).concurrency
        pool = self._pools.get(model)
        if pool is None or pool.line:
            return None
        member = pool.free(self._places, concurrency)
        if member is None and pool.members:
            self._want(pool, 1)
            member = pool.free(self._places, concurrency)
        if member is not None:
            self._take(member)
            self._ledger.start(model)
        return member

    def hold(self, model: str, tenant: str, priority: Priority, size: int, *, arrived: float | None = None, again: bool = False) -> Hold:
        """Joins the line with a body of `size` bytes, for at most the model's `max_wait_seconds`.

        arrived: when the request came; None: now. again: the request had its place and its replica failed; it goes ahead of later ones and
        no bound applies to it.
        Raises: UnknownModel, QueueFull, CannotStart.
        """
        seconds = self._ledger.limits(model).max_wait_seconds
        pool = self._pool(model)
        if not (pool.members or again):
            self._failed_starts.check(model, asyncio.get_running_loop().time(), tried=bool(pool.line))
        hold = Hold(pool, tenant, priority, size)
        pool.line.push(hold, tenant, priority, first=again)
        try:
            self._ledger.hold(model, size, bounded=not again, arrived=arrived)
        except QueueFull:
            pool.line.remove(hold, tenant, priority)
            self._want(pool, len(pool.line))
            raise
        hold.timer = hold.future.get_loop().call_later(seconds, self._expire, hold, seconds)
        self._want(pool, len(pool.line))
        return hold

    def leave(self, hold: Hold) -> None:
        """The held request no longer waits: its client left. A place that it was handed meanwhile goes to the next one."""
        if hold.waiting:
            hold.pool.line.remove(hold, hold.tenant, hold.priority)
            hold.settle()
            self._ledger.leave(hold.pool.model, hold.size)
            self._want(hold.pool, len(hold.pool.line))
        elif hold.future.done() and not hold.future.cancelled() and hold.future.exception() is None:
            self.release(hold.future.result())

    def release(self, member: Member) -> None:
        """The replica has ended its work on a request, well or not."""
        self._ledger.end(member.pool.model)
        member.in_flight -= 1
        if member.in_flight == 0:
            member.idle.set()
        if member in self._let_go:
            if member.in_flight:
                member.upstream.close_idle()
            else:
                self._end(member)
        elif member.draining:
            member.upstream.close_idle()
        self._places.freed(member.backend.id)
        self._serve(member.pool)
        self._places.idle(member.backend.id)

    def failed(self, member: Member, error: BaseException) -> None:
        """The replica failed a request before its first byte: it gets no more until it accepts a connection. Its place is still taken."""
        if member not in self._let_go:
            self.suspects.failed(member, error)

    def refuse_held(self, reason: str) -> None:
        """Every held request is refused, for the reason given."""
        for pool in self._pools.values():
            self._refuse(pool, NoReplica(reason))

    async def close(self) -> None:
        """Removes every replica, cuts what is in flight, and returns when all connections are closed."""
        self._sleepers.close()
        for member in [*self._members.values(), *self._let_go]:
            self._taken_out(member.backend.id)
            self._end(member, seconds=0.0)
        if self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _set(self, member: Member, *, rests: bool, ending: bool, asleep: bool | None = None) -> None:
        before = member.draining
        member.rests, member.ending = rests, ending
        if asleep is not None:
            self._sleepers.is_awake(member, not asleep)
        if member.draining == before or self._members.get(member.backend.id) is not member:
            return
        self._count(member.pool)
        if member.draining:
            self._places.dropped(member.backend.id)
            member.upstream.close_idle()
        else:
            self._serve(member.pool)

    def _taken_out(self, replica_id: str) -> Member | None:
        """Of its pool: nothing goes to it any more, and nobody counts it."""
        member = self._members.pop(replica_id, None)
        if member is not None:
            del member.pool.members[replica_id]
            self._places.dropped(replica_id)
            self._count(member.pool)
        return member

    def _end(self, member: Member, seconds: float = _LAST_BYTES_SECONDS) -> None:
        self._let_go.discard(member)
        member.gone = True
        self.suspects.forget(member)
        member.idle.set()  # whoever waits for it to be idle waits for nothing
        self._background(self._close(member, seconds))

    async def _close(self, member: Member, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while member.in_flight:
                    member.idle.clear()
                    await member.idle.wait()
        await member.upstream.close()

    def _pool(self, model: str) -> Pool:
        pool = self._pools.get(model)
        if pool is None:
            pool = self._pools[model] = Pool(model)
        return pool

    def _count(self, pool: Pool) -> None:
        self._ledger.set_replicas(pool.model, pool.ready, len(pool.members), pool.unreachable)
        self._sleepers.count(pool)

    def _tried(self, member: Member) -> None:
        """A suspect did not accept a connection, or did."""
        if self._members.get(member.backend.id) is member:
            self._count(member.pool)
            if member.takes_requests and self._ledger.knows(member.pool.model):
                self._serve(member.pool)

    def _serve(self, pool: Pool) -> None:
        if not pool.line:
            return
        concurrency = self._ledger.limits(pool.model).concurrency
        while pool.line:
            member = pool.free(self._places, concurrency)
            if member is None:
                break
            hold = pool.line.pop()
            hold.settle()
            if hold.future.done():  # cancelled in this very turn of the loop; its task has not run yet
                self._ledger.leave(pool.model, hold.size)
                continue
            self._take(member)
            self._ledger.hand_over(pool.model, hold.size)
            hold.future.set_result(member)
        self._want(pool, len(pool.line))

    def _room(self, model: str) -> None:
        if (pool := self._pools.get(model)) is not None and self._ledger.knows(model):
            self._serve(pool)

    def _take(self, member: Member) -> None:
        member.in_flight += 1
        self._places.taken(member.backend.id, member.pool.model)

    def _line(self, pool: Pool) -> tuple[int, int]:
        """How many requests wait, and on how many a replica works."""
        return (len(pool.line), self._ledger.limits(pool.model).concurrency) if self._ledger.knows(pool.model) else (0, 1)

    def _want(self, pool: Pool, requests: int) -> None:
        """So many have no place."""
        replicas = [each.backend.id for each in pool.members.values() if each.takes_requests] if requests else ()
        self._places.wanted(pool.model, requests, replicas)
        self._sleepers.wanted(pool, requests)

    def _expire(self, hold: Hold, seconds: float) -> None:
        if not hold.waiting:
            return
        model = hold.pool.model
        last = self._ledger.failure(model)
        self.leave(hold)
        if not hold.future.done():
            if not last:
                why = self._explain(model) or "none has failed to start so far, the model may need longer than that"
            else:
                why = f"the last try to make one failed: {last}"
            hold.future.set_exception(NoReplica(f"no replica of model {model!r} was free within {seconds:g} s; {why}"))

    def _refuse(self, pool: Pool, reason: Exception) -> None:
        while pool.line:
            hold = pool.line.pop()
            hold.settle()
            self._ledger.leave(pool.model, hold.size)
            if not hold.future.done():
                hold.future.set_exception(reason)
        self._want(pool, 0)

    def _declared(self, model: str) -> None:
        self._failed_starts.forget(model)
        pool = self._pools.get(model)
        if pool is None:
            return
        if self._ledger.knows(model):
            self._serve(pool)
        else:
            self._refuse(pool, NoReplica(f"model {model!r} was withdrawn"))

    def _background(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        told(task, log)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task
