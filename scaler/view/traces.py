"""Activations as OpenTelemetry's traces: one trace for each, with a span for each phase, sent to a collector by OTLP.

The trace is that of the activation's first request (W3C's trace context), or a new one, sampled by what `OTEL_TRACES_SAMPLER` says; a
client's sampled flag is kept to. The engine and the agent are told of it. All spans are made here, also those of what the agent does: an
agent tells when its phases were since it began, and its answer's arrival says when that was by this clock. So no two machines' clocks meet
in a trace, no span lies outside of its parent, and a node has to reach no collector. Rejected: spans made by the agent, whose clock may
differ by more than a restore takes.

Spans are made when the answer's first byte is on its way, and sent by a thread of their own from a queue that has a bound: a collector that
is slow or away costs spans and no request. It imports OpenTelemetry, so it is imported only if traces are wanted (programs/tracing.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Mapping
from importlib.metadata import version

from multidict import CIMultiDictProxy
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scaler.books.activation import Activation, TraceContext
from zerowake_shared.phases import Phase

_LAST_SPANS_SECONDS = 2.0  # for what is queued at the end of the program
_PROPAGATOR = TraceContextTextMapPropagator()


class _Fields(Getter[CIMultiDictProxy[str]]):
    """A request's fields. A traceparent that stands there twice is none, as the standard has it."""

    def get(self, carrier: CIMultiDictProxy[str], key: str) -> list[str] | None:
        found = carrier.getall(key, [])
        return None if not found or (key == "traceparent" and len(found) > 1) else found

    def keys(self, carrier: CIMultiDictProxy[str]) -> list[str]:
        return list(carrier)


_FIELDS = _Fields()


class Traces:
    """Hears of activations: `begin` as their first request comes, `ended` at their end. environ: the program's environment."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        about = {"service.version": version("zerowake")} | ({} if named else {"service.name": "zerowake"})
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(environ)))
        self._tracer = self._provider.get_tracer("zerowake", version("zerowake"))
        self._open: dict[str, Span] = {}

    def begin(self, activation: Activation, headers: CIMultiDictProxy[str]) -> TraceContext:
        """headers: of its first request."""
        parent = _PROPAGATOR.extract(headers, Context(), _FIELDS)
        about = {"zerowake.activation": activation.id, "zerowake.model": activation.model}
        span = self._tracer.start_span("activation", parent, SpanKind.SERVER, about, start_time=_nanoseconds(activation.began))
        self._open[activation.id] = span
        told: dict[str, str] = {}
        _PROPAGATOR.inject(told, set_span_in_context(span, parent))
        return TraceContext(**told)

    def ended(self, activation: Activation) -> None:
        """Returns at once; an activation that began without a request has no trace."""
        if (span := self._open.pop(activation.id, None)) is not None:
            asyncio.get_running_loop().call_soon(self._finish, span, activation)  # the first byte goes first

    def _finish(self, span: Span, activation: Activation) -> None:
        if span.is_recording():
            inside = set_span_in_context(span, Context())
            for phase, interval in activation.intervals.items():
                child = self._tracer.start_span(phase, inside, start_time=_nanoseconds(activation.began + interval.begin))
                child.end(_nanoseconds(activation.began + interval.end))
            span.set_attribute("zerowake.outcome", activation.outcome)
            span.set_attribute("zerowake.unaccounted_seconds", activation.phases[Phase.UNACCOUNTED])
            if activation.origin:
                span.set_attribute("zerowake.origin", activation.origin)
            if activation.outcome != "served":
                span.set_status(Status(StatusCode.ERROR, activation.reason))
        span.end(_nanoseconds(activation.began + activation.total))

    async def close(self) -> None:
        """Sends what is queued, if that takes no longer than a moment."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody has waited so long
                loop.call_soon_threadsafe(done.set)

        # Of its own, and nobody's to wait for: an executor's thread would keep the program from ending.
        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SPANS_SECONDS):
                await done.wait()


def _exporter(environ: Mapping[str, str]) -> SpanExporter:
    """The one for the protocol that is asked for; it reads where to, and with what, from the environment itself."""
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc  # noqa: PLC0415

        return OverGrpc()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp  # noqa: PLC0415

        return OverHttp()
    raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: use grpc or http/protobuf")


def _nanoseconds(moment: float) -> int:
    return round(moment * 1e9)
