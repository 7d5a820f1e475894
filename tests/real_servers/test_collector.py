"""Scale-ups as traces at a real collector of OpenTelemetry's, over gRPC and HTTP, and over one that is away for a while."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.worlds.machine import Machine, machine
from tests.worlds.otel_collector import PROGRAM, OtelCollector, otel_collector

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="needs a collector of OpenTelemetry's: `make servers` builds it")
_PORT = 8000
_SERVER = f"import http.server as h; h.HTTPServer(('', {_PORT}), h.SimpleHTTPRequestHandler).serve_forever()"
MODEL = {"command": [sys.executable, "-c", _SERVER], "port": _PORT, "health": "/", "cooldown_seconds": 0.5, "polling_seconds": 0.2}


def environment(endpoint: str, protocol: str) -> dict[str, str]:
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    return os.environ | told


async def scaled_up(made: Machine, trace: str, count: int) -> None:
    """From zero, for a client that has a trace of its own, and back."""
    assert await made.ask("cold", "/", traceparent=f"00-{trace}-{'ab' * 8}-01") == 200
    await made.until("scaler", 'zerowake_activations_total{model="cold",outcome="served"}', lambda value: value == count)
    await made.until("scaler", 'zerowake_replicas{model="cold"}', lambda value: value == 0)


async def kept(there: OtelCollector, trace: str) -> None:
    """The whole of it: one span for the activation, of the client's, and of that one for each phase."""
    spans = await there.spans(trace)
    (root,) = [span for span in spans if span["name"] == "activation"]
    assert root["parentSpanId"] == "ab" * 8
    about = {each["key"]: value(each) for each in root["attributes"]}
    assert (about["zerowake.model"], about["zerowake.origin"], about["zerowake.outcome"]) == ("cold", "cold", "served")
    phases = [span for span in spans if span is not root]
    assert {"held", "health", "first_byte"} <= {span["name"] for span in phases}
    assert all(span["parentSpanId"] == root["spanId"] for span in phases)
    begin, end = int(root["startTimeUnixNano"]), int(root["endTimeUnixNano"])
    assert all(begin <= int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"]) <= end for span in phases)


def value(attribute: dict[str, Any]) -> Any:
    (found,) = attribute["value"].values()
    return found


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_trace_comes_whole(tmp_path: Path, protocol: str) -> None:
    trace = secrets.token_hex(16)
    with otel_collector(tmp_path / "collector") as there:
        endpoint = f"http://127.0.0.1:{there.port if protocol == 'grpc' else there.http_port}"
        async with machine(tmp_path / "state", {"cold": MODEL}, environment(endpoint, protocol)) as made:
            await scaled_up(made, trace, 1)
            await kept(there, trace)


async def test_a_collector_that_is_away_costs_no_request_and_is_told_again_when_it_is_back(tmp_path: Path) -> None:
    first, last = secrets.token_hex(16), secrets.token_hex(16)
    with otel_collector(tmp_path / "collector") as there:
        pass
    async with machine(tmp_path / "state", {"cold": MODEL}, environment(f"http://127.0.0.1:{there.port}", "grpc")) as made:
        await scaled_up(made, first, 1)
        with otel_collector(tmp_path / "collector", there.port) as there:
            await scaled_up(made, last, 2)
            await kept(there, last)
