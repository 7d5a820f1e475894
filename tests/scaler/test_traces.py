"""Activations as traces, sent to a collector that speaks OTLP: whose trace they are, what spans they have, and what they cost a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from scaler.books.activation import Activation, Activations
from scaler.view.traces import Traces
from tests.worlds.collector import Collector, collector
from tests.worlds.front import Front, front
from tests.worlds.raw_client import raw_client
from tests.worlds.raw_engine import raw_engine, saying

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@asynccontextmanager
async def exported(monkeypatch: pytest.MonkeyPatch, activations: Activations, **environ: str) -> AsyncIterator[tuple[Collector, Traces]]:
    async with collector() as there:
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{there.port}")
        for name, value in environ.items():
            monkeypatch.setenv(name, value.format(http=there.http_port))
        traces = Traces(environ)
        activations.on_end(traces.ended)
        yield there, traces
        await traces.close()


@asynccontextmanager
async def traced(monkeypatch: pytest.MonkeyPatch, **environ: str) -> AsyncIterator[tuple[Front, Collector]]:
    async with front(max_wait_seconds=30) as f, exported(monkeypatch, f.activations, **environ) as (there, traces):
        f.gateway.traced_by(traces.begin)
        yield f, there


def fields(*told: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(told))


async def served(f: Front, *headers: bytes) -> list[bytes]:
    """A request from zero with these header lines: the lines that the engine got."""
    async with raw_engine(saying(ANSWER)) as engine, raw_client(f.url) as client:
        client.get("/models/m/x", *headers)
        await f.held(1)
        f.dispatcher.add(engine.replica())
        assert (await client.answer()).status == 200
        f.dispatcher.remove("r1")
        return engine.heads[0].split(b"\r\n")


def told(head: list[bytes], name: str) -> list[str]:
    return [line.decode().partition(": ")[2] for line in head if line.lower().startswith(name.encode() + b": ")]


def is_sampled(traceparent: str) -> bool:
    return bool(int(traceparent[-2:], 16) & 1)


async def test_the_clients_trace_goes_on_to_the_engine_and_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    async with traced(monkeypatch) as (f, there):
        head = await served(f, f"Traceparent: 00-{TRACE}-{SPAN}-01".encode(), b"tracestate: a=1,b=2", b"x-other: 1")
        (activation,) = f.activations.recent()
        trace = await there.trace()
        assert (trace.trace_id, trace.root.parent_span_id.hex()) == (TRACE, SPAN)
        assert [span.name for span in trace.phases] == ["held", "first_byte"]
        assert trace.root.end_time_unix_nano - trace.root.start_time_unix_nano == pytest.approx(activation.total * 1e9, abs=1000)
        assert trace.resource["service.name"] == "zerowake"
        about = trace.attributes
        assert (about["zerowake.activation"], about["zerowake.model"], about["zerowake.outcome"]) == (activation.id, "m", "served")
        assert told(head, "traceparent") == [f"00-{TRACE}-{trace.root.span_id.hex()}-01"]
        assert (told(head, "tracestate"), told(head, "x-other")) == (["a=1,b=2"], ["1"])
        assert activation.trace is not None and activation.trace.trace_id == TRACE


BROKEN = {
    "none": (),
    "of no version": (b"traceparent: ff-" + TRACE.encode() + b"-" + SPAN.encode() + b"-01",),
    "too short": (b"traceparent: 00-" + TRACE[:-1].encode() + b"-" + SPAN.encode() + b"-01",),
    "zeros": (b"traceparent: 00-" + b"0" * 32 + b"-" + SPAN.encode() + b"-01",),
    "nonsense": (b"traceparent: \xff\xfe",),
    "twice": (f"traceparent: 00-{TRACE}-{SPAN}-01".encode(), f"traceparent: 00-{TRACE}-{SPAN}-00".encode()),
}


@pytest.mark.parametrize("headers", BROKEN.values(), ids=BROKEN)
async def test_without_one_that_can_be_read_a_new_trace_begins(monkeypatch: pytest.MonkeyPatch, headers: tuple[bytes, ...]) -> None:
    async with traced(monkeypatch) as (f, there):
        head = await served(f, *headers)
        trace = await there.trace()
        assert trace.trace_id != TRACE
        assert not trace.root.parent_span_id
        (parent,) = told(head, "traceparent")
        assert parent.startswith(f"00-{trace.trace_id}-{trace.root.span_id.hex()}-")
        assert is_sampled(parent)


async def test_what_the_client_does_not_sample_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with traced(monkeypatch) as (f, there):
        head = await served(f, f"traceparent: 00-{TRACE}-{SPAN}-00".encode())
        (parent,) = told(head, "traceparent")
        assert parent.startswith(f"00-{TRACE}-") and not is_sampled(parent)
        await served(f)
        assert (await there.trace()).trace_id != TRACE  # the next one's came, and nothing before it
        assert there.empty


async def test_the_environment_says_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    async with traced(monkeypatch, OTEL_TRACES_SAMPLER="parentbased_always_off") as (f, there):
        assert not is_sampled(*told(await served(f), "traceparent"))
        await served(f, f"traceparent: 00-{TRACE}-{SPAN}-01".encode())
        assert (await there.trace()).trace_id == TRACE
        assert there.empty


async def test_who_joins_keeps_its_own_trace_and_who_waits_for_nothing_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with traced(monkeypatch) as (f, there):
        async with raw_engine(saying(ANSWER)) as engine, raw_client(f.url) as one, raw_client(f.url) as two:
            one.get("/models/m/one", f"traceparent: 00-{TRACE}-{SPAN}-01".encode())
            await f.held(1)
            other = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
            two.get("/models/m/two", f"traceparent: {other}".encode())
            await f.held(2)
            f.dispatcher.add(engine.replica())
            await one.answer()
            await two.answer()
            two.get("/models/m/three", b"TraceParent: as it is")
            await two.answer()
            heads = {head.split(b" ")[1]: head for head in engine.heads}
        assert told(heads[b"/two"].split(b"\r\n"), "traceparent") == [other]
        assert b"\r\nTraceParent: as it is\r\n" in heads[b"/three"]
        assert (await there.trace()).trace_id == TRACE
        assert there.empty


async def test_http_and_a_name_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:{http}"}
    async with traced(monkeypatch, **environ, OTEL_SERVICE_NAME="mine") as (f, there):
        await served(f)
        assert (await there.trace()).resource["service.name"] == "mine"
    with pytest.raises(ValueError, match="'json': use grpc or http/protobuf"):
        Traces({"OTEL_EXPORTER_OTLP_PROTOCOL": "json"})


def ended(activations: Activations, traces: Traces) -> Activation:
    activation = activations.begin("m", at=activations.clock.now() - 10)
    activation.trace = traces.begin(activation, fields())
    began = activations.clock.now() - 10
    activation.mark("held", at=began + 0.5)
    activation.add("image", 2.0, began - 1, began + 4)  # it had begun for another one
    activation.add("health", 3.0, began + 9, began + 12)  # it tells more than there was
    activation.made("restored")
    return activation


async def test_no_span_lies_outside_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    activations = Activations()
    async with exported(monkeypatch, activations) as (there, traces):
        activation = ended(activations, traces)
        activations.served("m")
        trace = await there.trace()  # which looks at each
        assert {span.name for span in trace.phases} == {"held", "image", "health"}
        assert trace.attributes["zerowake.origin"] == "restored"
        ended(activations, traces)
        activations.abandoned("m", "the client left")
        gone = await there.trace()
        assert (gone.root.status.code, gone.root.status.message) == (2, "the client left")
        assert gone.trace_id != trace.trace_id and activation.trace is not None
        activations.begin("asked for by nobody here")
        activations.served("asked for by nobody here")  # has no trace, and needs none


async def test_a_collector_that_is_silent_or_away_costs_no_request_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    async with traced(monkeypatch, OTEL_BSP_MAX_QUEUE_SIZE="8", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="4") as (f, there):
        there.silent = True
        await served(f)
        await there.asked.wait()
        for _ in range(20):  # more than the queue has room for
            await served(f)
        assert len(f.activations.recent(100)) == 21
    async with traced(monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1") as (f, _):
        for _ in range(3):
            await served(f)
