"""KEDA's ExternalScaler service: how much demand each model has, told when asked and pushed when it begins (push.py).

Unary calls are answered from memory: KEDA sets no deadline on them, and one that hangs keeps an object from being activated. What they say
of the present counts for what was since the last look, too (books/activity.py).

KEDA before 2.17 reads whole numbers only, later ones read them where the other is zero. Both are told. The target is rounded down, to one
at least, and the metric is set in proportion and rounded up: their quotient, rounded up, is the same number of replicas.

A model may be asked for elsewhere, and a source that says so be silent (scaler/sources). What it would say may be what the replicas are
there for, so the call fails, unless what is known is worth more than they are: KEDA and the HPA leave them as they are then, or do what the
ScaledObject's `fallback` says. A model that is in use for all that is known is active all the same.

A model belongs to one namespace. A trigger of another one that names it is no error: it is never active, and its metric is zero.

A stream ends with OK at shutdown and after half an hour, because only a clean end resets KEDA's back-off. A connection is told to go away
after ten minutes: its client then asks DNS again, finds the scaler's new replicas, and opens there what is rotated here. Opening a stream
again takes KEDA 2 s in which no push arrives, which at half an hour delays one activation in a thousand. A stream whose model waits for its
first replica is not rotated.
Rejected: an answer of 0 for a model that nobody declared, which would scale it to zero.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from zerowake_proto import externalscaler_pb2 as pb
from zerowake_proto import externalscaler_pb2_grpc as pb_grpc

from scaler.books.activation import Activations
from scaler.books.activity import REPEAT_SECONDS, Activity
from scaler.books.demand import DemandReader, UnknownModel
from scaler.books.trigger import BadTrigger, Trigger, parse_trigger
from scaler.keda.metrics import REFUSED, STREAMS_OPEN, STREAMS_ROTATED
from scaler.keda.push import Push, Stream
from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock
from zerowake_shared.listening import PINGS_WELCOME, listen
from zerowake_shared.tls import TlsFiles, server_credentials

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    WhyNot = Callable[[str, str], Awaitable[str]]

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["ExternalScaler"].full_name
# One name for all: it carries an object's index and namespace in KEDA anyway, and stays when the model's name is edited.
METRIC = "zerowake-pending"
STREAM_AGE_SECONDS = 1800.0
CONNECTION_AGE_SECONDS = 600.0
ACTIVE = pb.IsActiveResponse(result=True)
_PENDING_CALLS = 50_000
_MOST = 1 << 53  # as a whole number: beyond it floats have none


class ExternalScaler(pb_grpc.ExternalScalerServicer):
    """The five RPCs over one gateway's demand, and that of the others.

    activity: what was told of the models' use; None: nobody else tells. owner: the namespace that a model belongs to; empty: any may scale
    it. why_not: why the object of this namespace and name cannot be scaled at all; empty: it can. on_trigger: hears of each trigger
    that KEDA opens a stream for; on_pushed: of the model of each push that is written.
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
        activity: Activity | None = None,
        owner: Callable[[str], str] = lambda _: "",
        why_not: WhyNot | None = None,
    ) -> None:
        self._chance = chance
        self._demand = demand
        self._activity = activity or Activity(demand, clock, repeat_seconds)
        self._push = Push(demand, self._activity, activations, on_pushed, repeat_seconds, clock)
        self._owner = owner
        self._why_not = why_not
        self._on_trigger = on_trigger
        self._repeat = repeat_seconds
        self._age = stream_age_seconds
        self._streams: set[Stream] = set()
        self._foreign: set[tuple[str, str, str]] = set()  # objects that were told so already, and which model they name
        self._closing = False

    # --- unary calls: memory only

    async def IsActive(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:
        trigger = await self._trigger("IsActive", request, context)
        load, unsure = await self._seen("IsActive", request, trigger, context)
        if not load and unsure:
            await _refuse("IsActive", context, grpc.StatusCode.UNAVAILABLE, f"{_name(request)}: {unsure}")
        return pb.IsActiveResponse(result=load > 0)

    async def GetMetricSpec(self, request: pb.ScaledObjectRef, context: Context) -> pb.GetMetricSpecResponse:
        # From the metadata alone: KEDA's fallback covers a failing GetMetrics, but nothing covers a failing GetMetricSpec.
        return _spec(await self._trigger("GetMetricSpec", request, context))

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        ref = request.scaledObjectRef
        trigger = await self._trigger("GetMetrics", ref, context)
        if request.metricName != METRIC:
            message = f"{_name(ref)} has no metric {request.metricName!r}: its only one is {METRIC}, as GetMetricSpec says"
            await _refuse("GetMetrics", context, grpc.StatusCode.INVALID_ARGUMENT, message)
        load, unsure = await self._seen("GetMetrics", ref, trigger, context)
        if unsure:
            await _refuse("GetMetrics", context, grpc.StatusCode.UNAVAILABLE, f"{_name(ref)}: {unsure}")
        value = pb.MetricValue(metricName=METRIC, metricValueFloat=load, metricValue=_in_proportion(load, trigger))
        return pb.GetMetricsResponse(metricValues=[value])

    # --- streams

    async def StreamIsActive(self, request: pb.ScaledObjectRef, context: Context) -> AsyncIterator[pb.IsActiveResponse]:
        trigger = await self._trigger("StreamIsActive", request, context)
        if self._on_trigger:
            self._on_trigger(trigger)
        model = trigger.model
        with self._open("StreamIsActive", model, lambda: self._owns(request, model)) as stream, self._push.listening(model, stream):
            while cause := await stream.due():
                yield ACTIVE
                self._push.written(model, cause)

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
    def _open(self, rpc: str, model: str, admitted: Callable[[], bool] = lambda: True) -> Iterator[Stream]:
        """A stream that ends by itself when it is old enough."""
        loop = asyncio.get_running_loop()
        stream = Stream(admitted)
        timer: asyncio.TimerHandle

        def rotate() -> None:
            nonlocal timer
            if self._push.starved(model):
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

    # --- what a request says

    async def _trigger(self, rpc: str, ref: pb.ScaledObjectRef, context: Context) -> Trigger:
        if self._why_not and (reason := await self._why_not(ref.namespace, ref.name)):
            await _refuse(rpc, context, grpc.StatusCode.FAILED_PRECONDITION, reason)
        try:
            return parse_trigger(ref.scalerMetadata)
        except BadTrigger as error:
            await _refuse(rpc, context, grpc.StatusCode.INVALID_ARGUMENT, f"{_name(ref)}: {error}")

    async def _seen(self, rpc: str, ref: pb.ScaledObjectRef, trigger: Trigger, context: Context) -> tuple[float, str]:
        """Requests that are pending, as the autoscaler is to see them (`Demand.load`); 1 where there are none but some were since the last
        look; 0 for an object that has no say. And why that is not to be acted upon (`Demand.unsure`)."""
        try:
            demand = self._demand.demand_anywhere(trigger.model)
            used = self._activity.look(trigger.model, rpc, ref.namespace, ref.name)
        except UnknownModel as error:
            # An error keeps the replicas as they are; "no demand" would take them away from a model that is declared a moment later.
            await _refuse(rpc, context, grpc.StatusCode.NOT_FOUND, f"{_name(ref)}: {error}")
        if not self._owns(ref, trigger.model):
            return 0, ""
        return max(demand.load(trigger.target_pending), float(used)), demand.unsure(trigger.target_pending)

    def _owns(self, ref: pb.ScaledObjectRef, model: str) -> bool:
        """Whether the object's namespace is the model's; if not, the log says so once."""
        owner = self._owner(model)
        if not owner or owner == ref.namespace:
            return True
        key = (ref.namespace, ref.name, model)
        if key not in self._foreign:
            self._foreign.add(key)
            log.warning(
                "%s names the model %s, which is namespace %s's already: it is not scaled; give the model another name",
                _name(ref),
                model,
                owner,
            )
        return False


async def _refuse(rpc: str, context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
    REFUSED.labels(rpc, code.name).inc()
    await context.abort(code, message)


def _name(ref: pb.ScaledObjectRef) -> str:
    return f"ScaledObject {ref.namespace}/{ref.name}"


def _spec(trigger: Trigger) -> pb.GetMetricSpecResponse:
    spec = pb.MetricSpec(metricName=METRIC, targetSizeFloat=trigger.target_pending, targetSize=_whole_target(trigger))
    return pb.GetMetricSpecResponse(metricSpecs=[spec])


def _whole_target(trigger: Trigger) -> int:
    return max(1, math.floor(min(trigger.target_pending, _MOST)))


def _in_proportion(pending: float, trigger: Trigger) -> int:
    """The whole metric that is to the whole target what `pending` is to the target itself: never zero where there is any."""
    if not pending:
        return 0
    exact = pending * _whole_target(trigger) / trigger.target_pending
    return max(1, math.ceil(round(exact, 6)))  # 3 / 0.1 is a little more than 30


@asynccontextmanager
async def serve_external_scaler(
    demand: DemandReader,
    *,
    address: str,
    tls: TlsFiles | None = None,
    activity: Activity | None = None,
    activations: Activations | None = None,
    owner: Callable[[str], str] = lambda _: "",
    why_not: WhyNot | None = None,
    on_trigger: Callable[[Trigger], None] | None = None,
    on_pushed: Callable[[str], None] | None = None,
    repeat_seconds: float = REPEAT_SECONDS,
    stream_age_seconds: float = STREAM_AGE_SECONDS,
    clock: Clock = SYSTEM_CLOCK,
) -> AsyncIterator[str]:
    """Serves the scaler, gRPC health and reflection; yields the bound address. `address`: `host:port` (port 0: any) or `unix:/path`.

    The other arguments are ExternalScaler's.

    Raises:
        CannotListen: the address is taken or impossible.
        BadCertificate: `tls` cannot be used.
    """
    scaler = ExternalScaler(
        demand,
        activations,
        on_trigger,
        on_pushed,
        repeat_seconds,
        stream_age_seconds,
        clock,
        activity=activity,
        owner=owner,
        why_not=why_not,
    )
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),  # a second scaler on the same port is a mistake to hear of, not to share KEDA's calls with
            ("grpc.max_connection_age_ms", int(CONNECTION_AGE_SECONDS * 1000)),
            # A client that vanished without a word would otherwise hold its streams until they are rotated.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # gRPC cancels calls at random when more than a thousand have come in one instant, as they do where KEDA begins anew. Each is
            # answered from memory.
            ("grpc.server.max_pending_requests", _PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING_CALLS),
            *PINGS_WELCOME,
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
