"""Traces of a whole machine: from a client's request through gateway, scaler and agent, with a real restore, to the engine's first byte."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaler.programs.tracing import traced, wanted
from tests.worlds.collector import collector
from tests.worlds.command import zerowake
from tests.worlds.front import front
from tests.worlds.machine import machine

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ENGINE = Path(__file__).parents[1] / "worlds" / "hashing_engine.py"
PORT = 8000  # in a network namespace of its own
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("environ", "is_wanted"),
    [
        ({}, False),
        ({ENDPOINT: ""}, False),
        ({ENDPOINT: "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4317"}, False),
        ({ENDPOINT: "http://c:4317", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({ENDPOINT: "http://c:4317", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({ENDPOINT: "http://c:4317", "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_the_environment_turns_it_on(environ: dict[str, str], is_wanted: bool) -> None:
    assert wanted(environ) is is_wanted


async def test_what_cannot_be_done_is_told_and_models_are_served(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with front() as f, traced(f.activations, f.gateway, {ENDPOINT: "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier pigeon"}):
        assert "'carrier pigeon': use grpc or http/protobuf" in caplog.text


def test_nothing_of_it_is_imported_while_it_is_off() -> None:
    said = "import scaler.programs.up, scaler.programs.serve, sys; print([name for name in sys.modules if 'opentelemetry.sdk' in name])"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces")
async def test_a_restore_is_one_trace(tmp_path: Path) -> None:
    state, weights = tmp_path / "state", tmp_path / "weights.bin"
    weights.write_bytes(os.urandom(1 << 20))
    command = [sys.executable, str(ENGINE), str(PORT), "8", str(weights)]
    await zerowake("snapshot", "create", "tiny", "--state", str(state), "--port", str(PORT), "--canary", "/sum", "--", *command)
    async with collector() as there:
        environment = os.environ | {ENDPOINT: f"http://127.0.0.1:{there.port}", "OTEL_BSP_SCHEDULE_DELAY": "50"}
        model = {"snapshot": "tiny", "max_wait_seconds": 60}
        async with machine(state, {"tiny": model}, environment) as made:
            assert await made.ask("tiny", "/sum", traceparent=f"00-{TRACE}-{SPAN}-01") == 200
            trace = await there.trace()  # all spans inside of the root, and its children
            name = trace.attributes["zerowake.activation"]
            shown = await zerowake("trace", "--state", str(state))
            told = json.loads(await zerowake("trace", name[:8], "-o", "json", "--state", str(state)))
            assert "seconds:" in await zerowake("trace", name, "-o", "yaml", "--state", str(state))
            unknown = await zerowake("trace", "xyz", "--state", str(state), code=1)
    assert (trace.trace_id, trace.root.parent_span_id.hex()) == (TRACE, SPAN)
    assert (trace.attributes["zerowake.origin"], trace.attributes["zerowake.outcome"]) == ("restored", "served")
    names = [span.name for span in trace.phases]
    assert {"held", "pushed", "scheduled", "staged", "image", "first_byte"} <= set(names), names
    assert (names[0], names[-1]) == ("held", "first_byte"), "in the order of a start"
    begins = {span.name: span.start_time_unix_nano for span in trace.phases}
    ends = {span.name: span.end_time_unix_nano for span in trace.phases}
    assert ends["scheduled"] <= begins["image"] < ends["image"] <= begins["first_byte"]
    assert trace.attributes["zerowake.unaccounted_seconds"] < (trace.root.end_time_unix_nano - trace.root.start_time_unix_nano) / 1e9
    assert [each["name"] for each in told["phases"]] == names, "the terminal shows what the collector was sent"
    assert (told["id"], told["trace"], told["origin"]) == (name, TRACE, "restored")
    assert f"activation:  {name}\n" in shown and all(phase in shown for phase in [*names, "unaccounted", "█"])
    assert unknown.strip() == f"zerowake: of the scale-ups none is 'xyz'; there are: {name}"
    log = (tmp_path / "machine.log").read_text()
    told = next(found for line in log.splitlines() if (found := _activation(line)))
    assert told["trace"] == TRACE
    assert f"activation {told['activation']} of trace {TRACE}: replica" in log, "the agent's log names it, too"


def _activation(line: str) -> dict[str, str]:
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if told.get("message") == "activation" or "activation" in told else {}
