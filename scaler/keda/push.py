"""Who listens for a model's demand, and when they are told.

Streams carry `true` only, since KEDA ignores `false`. One `true` may be lost (the object is not ready yet, or KEDA's own write failed), and
each one makes KEDA write the object's status, and with it the time from which its cooldown counts. So it goes out
- at once when the first request comes that has no replica;
- when a stream opens while there is demand;
- every 3 s (REPEAT_SECONDS) while there is demand and no replica;
- when requests begin or end while there are replicas, but within 3 s of the last push not at once: then when those are over, so that the
  cooldown counts from the end of the last request, and from 3 s later at most. A model without a replica is not told of requests that
  have ended: nobody would be there for the replica. Until a push that is due is out, whoever asks hears the same (books/activity.py).
A waiting stream costs no task and no timer that ticks: the ledger calls at first demand, and one task a model watches the rest.
Rejected: a subscription and a timer for every stream.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from scaler.books.activation import Activations
from scaler.books.activity import REPEAT_SECONDS, Activity
from scaler.books.demand import DemandReader, Subscription, UnknownModel
from scaler.keda.metrics import PUSH_SECONDS, PUSHES
from zerowake_shared.background import kept
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.phases import Phase

log = logging.getLogger(__name__)


class Stream:
    """One open stream: a push that is due (pushes coalesce, a slow reader never queues more than one), or its end.

    admitted: whether it may be told of the model's demand now.
    """

    __slots__ = ("_cause", "_ended", "_waiter", "admitted")

    def __init__(self, admitted: Callable[[], bool] = lambda: True) -> None:
        self.admitted = admitted
        self._cause: str | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def push(self, cause: str) -> None:
        self._cause = self._cause or cause
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    async def due(self) -> str | None:
        """The cause of the next push, or None at the stream's end."""
        while self._cause is None and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        cause, self._cause = self._cause, None
        return cause

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


class _Listeners:
    """The StreamIsActive streams of one model. `pushed`: when they were last told, by the clock."""

    __slots__ = ("declared", "pushed", "streams", "task")

    def __init__(self) -> None:
        self.streams: set[Stream] = set()
        self.declared = asyncio.Event()
        self.pushed = -math.inf
        self.task: asyncio.Task[None] | None = None

    def push(self, cause: str, now: float) -> None:
        self.pushed = now
        for stream in self.streams:
            if stream.admitted():
                stream.push(cause)


class Push:
    """All listeners. on_pushed: called with the model of each push that is written."""

    def __init__(
        self,
        demand: DemandReader,
        activity: Activity,
        activations: Activations | None = None,
        on_pushed: Callable[[str], None] | None = None,
        repeat_seconds: float = REPEAT_SECONDS,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._demand = demand
        self._activity = activity
        self._activations = activations
        self._on_pushed = on_pushed
        self._repeat = repeat_seconds
        self._now = clock.now
        self._listeners: dict[str, _Listeners] = {}
        self._first: dict[str, float] = {}  # model → the moment of its first demand, until a push for it is written
        demand.on_first_demand_anywhere(self._first_demand)
        demand.on_declaration(self._declaration)

    @contextmanager
    def listening(self, model: str, stream: Stream) -> Iterator[None]:
        """The stream hears of the model's demand, of what there is already to begin with."""
        listeners = self._listeners.get(model)
        if listeners is None:
            listeners = self._listeners[model] = _Listeners()
            follow, name = functools.partial(self._follow, model, listeners), f"demand of {model} for KEDA"
            listeners.task = asyncio.create_task(kept(follow, name, log), name=name)
        listeners.streams.add(stream)
        if not self.starved(model):
            # That demand ended before any stream could tell KEDA of it: the next push is for another one, and is not timed from it.
            self._first.pop(model, None)
        with suppress(UnknownModel):
            if self._demand.demand_anywhere(model).pending > 0 and stream.admitted():
                stream.push("open")
                if len(listeners.streams) == 1:
                    listeners.pushed = self._now()
        try:
            yield
        finally:
            listeners.streams.discard(stream)
            if not listeners.streams:
                del self._listeners[model]
                assert listeners.task
                listeners.task.cancel()

    def written(self, model: str, cause: str) -> None:
        """A push of the model is on its way to KEDA."""
        PUSHES.labels(cause).inc()
        self._activity.tell(model)
        first = self._first.pop(model, None)
        if first is not None:
            PUSH_SECONDS.observe(self._now() - first)
            if self._activations and (activation := self._activations.current(model)):
                activation.mark(Phase.PUSHED)
        if self._on_pushed:
            self._on_pushed(model)

    def starved(self, model: str) -> bool:
        """Whether its requests wait for a first replica."""
        try:
            demand = self._demand.demand_anywhere(model)
        except UnknownModel:
            return False
        return demand.pending > 0 and demand.replicas == 0

    def _first_demand(self, model: str) -> None:
        self._first[model] = self._now()
        if listeners := self._listeners.get(model):
            listeners.push("edge", self._now())

    def _declaration(self, model: str) -> None:
        if listeners := self._listeners.get(model):
            listeners.declared.set()

    async def _follow(self, model: str, listeners: _Listeners) -> None:
        """Repeats what `_first_demand` said while there is no replica, and tells of use above zero. Waits while the model is unknown."""
        try:
            while True:
                listeners.declared.clear()
                with suppress(UnknownModel), self._demand.subscribe(model) as subscription:
                    await self._watch(model, listeners, subscription)
                await listeners.declared.wait()
        except Exception:
            log.exception("the scaler lost sight of the demand of %s: its streams are ended, so that KEDA opens them again", model)
            for stream in listeners.streams:
                stream.end()

    async def _watch(self, model: str, listeners: _Listeners, subscription: Subscription) -> None:
        while True:
            starved, used, now = self.starved(model), self._activity.untold(model), self._now()
            if (starved or used) and now >= listeners.pushed + self._repeat:
                listeners.push("repeat" if starved else "edge", now)
            with suppress(TimeoutError):
                async with asyncio.timeout(listeners.pushed + self._repeat - now if starved or used else None):
                    await subscription.changed()
