"""A collector of OpenTelemetry's: the OTLP service for traces, over gRPC and over HTTP, on real sockets. What it is sent is held to what
the protocol asks of a span.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from aiohttp import web
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

PATIENCE = 60.0  # seconds


@dataclass
class Trace:
    """One trace as it came: its root, and the spans inside of it in the order in which they began."""

    trace_id: str
    root: trace_pb2.Span
    phases: list[trace_pb2.Span]
    resource: dict[str, str]

    @property
    def attributes(self) -> dict[str, Any]:
        return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in self.root.attributes}

    def check(self) -> None:
        """That all spans are whole, inside of the root, and its children."""
        for span in (self.root, *self.phases):
            assert (len(span.trace_id), len(span.span_id)) == (16, 8)
            assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano, span.name
        assert len({span.span_id for span in self.phases} | {self.root.span_id}) == len(self.phases) + 1
        for span in self.phases:
            assert (span.trace_id, span.parent_span_id) == (self.root.trace_id, self.root.span_id)
            assert self.root.start_time_unix_nano <= span.start_time_unix_nano, span.name
            assert span.end_time_unix_nano <= self.root.end_time_unix_nano, span.name


class Collector:
    """port: of gRPC; http_port: of HTTP. `silent`: it takes what comes and answers nothing."""

    def __init__(self) -> None:
        self.port = self.http_port = 0
        self.silent = False
        self.asked = asyncio.Event()
        self._traces: asyncio.Queue[Trace] = asyncio.Queue()

    async def trace(self) -> Trace:
        """The next one that comes, checked."""
        async with asyncio.timeout(PATIENCE):
            found = await self._traces.get()
        found.check()
        return found

    @property
    def empty(self) -> bool:
        return self._traces.empty()

    async def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any) -> Any:
        self.asked.set()
        while self.silent:
            await asyncio.sleep(3600)
        self._take(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    async def _post(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        self._take(trace_service_pb2.ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(body=trace_service_pb2.ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf")

    def _take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        for of_resource in request.resource_spans:
            resource = {each.key: each.value.string_value for each in of_resource.resource.attributes}
            spans = [span for scope in of_resource.scope_spans for span in scope.spans]
            for root in (span for span in spans if span.name == "activation"):
                inside = [span for span in spans if span.trace_id == root.trace_id and span is not root]
                inside.sort(key=lambda span: span.start_time_unix_nano)
                self._traces.put_nowait(Trace(root.trace_id.hex(), root, inside, resource))


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    made = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    made.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    app = web.Application()
    app.add_routes([web.post("/v1/traces", made._post)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.http_port = runner.addresses[0][1]
    try:
        yield made
    finally:
        await runner.cleanup()
        await server.stop(None)
