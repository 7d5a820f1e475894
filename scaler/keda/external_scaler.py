"""KEDA's ExternalScaler service: how much demand each model has, told when asked and pushed when it begins.

Unary calls are answered from memory: KEDA sets no deadline on them, and one that hangs keeps an object from being activated.

Streams carry `true` only, since KEDA ignores `false`. One `true` may be lost (the object is not ready yet, or KEDA's own write failed), and
each one makes KEDA write the object's status. So it goes out
- at each edge: demand after none, or the loss of the last replica under demand. While there are replicas an edge says no more than "still
  active", so it is left out within 3 s of the last push;
- when a stream opens while there is demand;
- every 3 s while there is demand and no replica.
A waiting stream costs no task and no timer that ticks: the ledger calls at first demand, and one task a model watches the rest.

A stream ends with OK at shutdown and after half an hour, because only a clean end resets KEDA's back-off. A connection is told to go away
after ten minutes: its client then asks DNS again, finds the scaler's new replicas, and opens there what is rotated here. Opening a stream
again takes KEDA 2 s in which no push arrives, which at half an hour delays one activation in a thousand. A stream whose model waits for its
first replica is not rotated.
Rejected: a subscription and a timer for every stream; an answer of 0 for a model that nobody declared, which would scale it to zero.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from zerowake_proto import externalscaler_pb2 as pb
from zerowake_proto import externalscaler_pb2_grpc as pb_grpc

from scaler.books.activation import Activations
from scaler.books.demand import DemandReader, Subscription, UnknownModel
from scaler.books.trigger import BadTrigger, Trigger, parse_trigger
from scaler.keda.metrics import PUSH_SECONDS, PUSHES, REFUSED, STREAMS_OPEN, STREAMS_ROTATED
from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock
from zerowake_shared.listening import listen
from zerowake_shared.tls import TlsFiles, server_credentials

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["ExternalScaler"].full_name
# One name for all: it carries an object's index and namespace in KEDA anyway, and stays when the model's name is edited.
METRIC = "zerowake-pending"
REPEAT_SECONDS = 3.0
STREAM_AGE_SECONDS = 1800.0
CONNECTION_AGE_SECONDS = 600.0
ACTIVE = pb.IsActiveResponse(result=True)


class _Stream:
    """One open stream: a push that is due (pushes coalesce, a slow reader never queues more than one), or its end."""

    __slots__ = ("_cause", "_ended", "_waiter")

    def __init__(self) -> None:
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
    """The StreamIsActive streams of one model. `pushed`: when all of them were last told, by the clock."""

    __slots__ = ("declared", "pushed", "streams", "task")

    def __init__(self) -> None:
        self.streams: set[_Stream] = set()
        self.declared = asyncio.Event()
        self.pushed = -math.inf
        self.task: asyncio.Task[None] | None = None

    def push(self, cause: str, now: float) -> None:
        self.pushed = now
        for stream in self.streams:
            stream.push(cause)


class ExternalScaler(pb_grpc.ExternalScalerServicer):
    """The five RPCs over one gateway's demand, and that of the others.

    on_trigger: hears of each trigger that KEDA opens a stream for; on_pushed: of each model when the push for its first demand is written.
    """

    def __init__(
        self,
        demand: DemandReader,
        activations: Activations | None = None,
        on_trigger: Callable[[Trigger], None] | None = None,
        on_pushed: Callable[[str], None] | None = None,
        repeat_seconds: float = REPEAT_SECONDS,
        stream_age_seconds: float = STREAM_AGE_SECONDS,
        clock: Clock = SYSTEM_CLOCK,
        chance: random.Random = SYSTEM_CHANCE,
    ) -> None:
        self._now = clock.now
        self._chance = chance
        self._demand = demand
        self._activations = activations
        self._on_trigger = on_trigger
        self._on_pushed = on_pushed
        self._repeat = repeat_seconds
        self._age = stream_age_seconds
        self._listeners: dict[str, _Listeners] = {}
        self._streams: set[_Stream] = set()
        self._first: dict[str, float] = {}  # model → the moment of its first demand, until a push for it is written
        self._closing = False
        demand.on_first_demand_anywhere(self._first_demand)
        demand.on_declaration(self._declaration)

    # --- unary calls: memory only

    async def IsActive(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:
        trigger = await self._trigger("IsActive", request, context)
        return pb.IsActiveResponse(result=await self._pending("IsActive", request, trigger, context) > 0)

    async def GetMetricSpec(self, request: pb.ScaledObjectRef, context: Context) -> pb.GetMetricSpecResponse:
        # From the metadata alone: KEDA's fallback covers a failing GetMetrics, but nothing covers a failing GetMetricSpec.
        return _spec(await self._trigger("GetMetricSpec", request, context))

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        ref = request.scaledObjectRef
        trigger = await self._trigger("GetMetrics", ref, context)
        if request.metricName != METRIC:
            message = f"{_name(ref)} has no metric {request.metricName!r}: its only one is {METRIC}, as GetMetricSpec says"
            await _refuse("GetMetrics", context, grpc.StatusCode.INVALID_ARGUMENT, message)
        pending = await self._pending("GetMetrics", ref, trigger, context)
        return pb.GetMetricsResponse(metricValues=[pb.MetricValue(metricName=METRIC, metricValueFloat=float(pending))])

    # --- streams

    async def StreamIsActive(self, request: pb.ScaledObjectRef, context: Context) -> AsyncIterator[pb.IsActiveResponse]:
        trigger = await self._trigger("StreamIsActive", request, context)
        if self._on_trigger:
            self._on_trigger(trigger)
        with self._open("StreamIsActive", trigger.model) as stream, self._listening(trigger.model, stream):
            while cause := await stream.due():
                yield ACTIVE
                self._pushed(trigger.model, cause)

    async def StreamMetricSpec(self, request: pb.ScaledObjectRef, context: Context) -> AsyncIterator[pb.GetMetricSpecResponse]:
        trigger = await self._trigger("StreamMetricSpec", request, context)
        with self._open("StreamMetricSpec", trigger.model) as stream:
            yield _spec(trigger)
            # The spec follows from the metadata, and KEDA opens a new stream when that changes.
            await stream.due()

    def close(self) -> None:
        """Ends every stream with OK; new ones end at once."""
        self._closing = True
        for stream in self._streams:
            stream.end()

    @contextmanager
    def _open(self, rpc: str, model: str) -> Iterator[_Stream]:
        """A stream that ends by itself when it is old enough."""
        loop = asyncio.get_running_loop()
        stream = _Stream()
        timer: asyncio.TimerHandle

        def rotate() -> None:
            nonlocal timer
            if self._starved(model):
                timer = loop.call_later(self._repeat, rotate)
            else:
                STREAMS_ROTATED.labels(rpc).inc()
                stream.end()

        # Spread, or streams opened together would leave together, and all objects be deaf in the same two seconds.
        timer = loop.call_later(self._age * self._chance.uniform(0.8, 1.2), rotate)
        self._streams.add(stream)
        STREAMS_OPEN.labels(rpc).inc()
        if self._closing:
            stream.end()
        try:
            yield stream
        finally:
            timer.cancel()
            self._streams.discard(stream)
            STREAMS_OPEN.labels(rpc).dec()

    @contextmanager
    def _listening(self, model: str, stream: _Stream) -> Iterator[None]:
        """The stream hears of the model's demand, of what there is already to begin with."""
        listeners = self._listeners.get(model)
        if listeners is None:
            listeners = self._listeners[model] = _Listeners()
            listeners.task = asyncio.create_task(self._follow(model, listeners), name=f"demand of {model} for KEDA")
        listeners.streams.add(stream)
        if not self._starved(model):
            # That demand ended before any stream could tell KEDA of it: the next push is for another one, and is not timed from it.
            self._first.pop(model, None)
        with suppress(UnknownModel):
            if self._demand.demand_anywhere(model).pending > 0:
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

    # --- the ledger's news

    def _first_demand(self, model: str) -> None:
        self._first[model] = self._now()
        if listeners := self._listeners.get(model):
            listeners.push("edge", self._now())

    def _declaration(self, model: str) -> None:
        if listeners := self._listeners.get(model):
            listeners.declared.set()

    async def _follow(self, model: str, listeners: _Listeners) -> None:
        """Repeats what `_first_demand` said while there is no replica, and tells of demand above zero. Waits while the model is unknown."""
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
        waited = self._demand.demand_anywhere(model).pending > 0
        while True:
            demand = self._demand.demand_anywhere(model)
            waits, now = demand.pending > 0, self._now()
            starved = waits and demand.replicas == 0
            if (starved or (waits and not waited)) and now >= listeners.pushed + self._repeat:
                listeners.push("repeat" if starved else "edge", now)
            waited = waits
            with suppress(TimeoutError):
                async with asyncio.timeout(listeners.pushed + self._repeat - now if starved else None):
                    await subscription.changed()

    def _pushed(self, model: str, cause: str) -> None:
        PUSHES.labels(cause).inc()
        first = self._first.pop(model, None)
        if first is None:
            return
        PUSH_SECONDS.observe(self._now() - first)
        if self._activations and (activation := self._activations.current(model)):
            activation.mark("pushed")
        if self._on_pushed:
            self._on_pushed(model)

    def _starved(self, model: str) -> bool:
        try:
            demand = self._demand.demand_anywhere(model)
        except UnknownModel:
            return False
        return demand.pending > 0 and demand.replicas == 0

    # --- what a request says

    async def _trigger(self, rpc: str, ref: pb.ScaledObjectRef, context: Context) -> Trigger:
        try:
            return parse_trigger(ref.scalerMetadata)
        except BadTrigger as error:
            await _refuse(rpc, context, grpc.StatusCode.INVALID_ARGUMENT, f"{_name(ref)}: {error}")

    async def _pending(self, rpc: str, ref: pb.ScaledObjectRef, trigger: Trigger, context: Context) -> int:
        try:
            return self._demand.demand_anywhere(trigger.model).pending
        except UnknownModel as error:
            # An error keeps the replicas as they are; "no demand" would take them away from a model that is declared a moment later.
            await _refuse(rpc, context, grpc.StatusCode.NOT_FOUND, f"{_name(ref)}: {error}")


async def _refuse(rpc: str, context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
    REFUSED.labels(rpc, code.name).inc()
    await context.abort(code, message)


def _name(ref: pb.ScaledObjectRef) -> str:
    return f"ScaledObject {ref.namespace}/{ref.name}"


def _spec(trigger: Trigger) -> pb.GetMetricSpecResponse:
    return pb.GetMetricSpecResponse(metricSpecs=[pb.MetricSpec(metricName=METRIC, targetSizeFloat=trigger.target_pending)])


@asynccontextmanager
async def serve_external_scaler(
    demand: DemandReader,
    *,
    address: str,
    tls: TlsFiles | None = None,
    activations: Activations | None = None,
    on_trigger: Callable[[Trigger], None] | None = None,
    on_pushed: Callable[[str], None] | None = None,
    repeat_seconds: float = REPEAT_SECONDS,
    stream_age_seconds: float = STREAM_AGE_SECONDS,
    clock: Clock = SYSTEM_CLOCK,
) -> AsyncIterator[str]:
    """Serves the scaler, gRPC health and reflection; yields the bound address. `address`: `host:port` (port 0: any) or `unix:/path`.

    Raises:
        CannotListen: the address is taken or impossible.
        BadCertificate: `tls` cannot be used.
    """
    scaler = ExternalScaler(demand, activations, on_trigger, on_pushed, repeat_seconds, stream_age_seconds, clock)
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),  # a second scaler on the same port is a mistake to hear of, not to share KEDA's calls with
            ("grpc.max_connection_age_ms", int(CONNECTION_AGE_SECONDS * 1000)),
            # A client that vanished without a word would otherwise hold its streams until they are rotated.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ]
    )
    pb_grpc.add_ExternalScalerServicer_to_server(scaler, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    bound = listen(server, address, "the external scaler", server_credentials(tls) if tls else None)
    await server.start()
    try:
        yield bound
    finally:
        # Streams first, so that they end with OK and KEDA's backoff is reset; what is still being written has a second.
        await healthy.enter_graceful_shutdown()
        scaler.close()
        await server.stop(grace=1)
