"""A real collector of OpenTelemetry's, as a process of its own: OTLP in, over gRPC and HTTP, and what it has understood in a file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster.layout import CACHE
from tests.worlds.ports import free_port
from tests.worlds.waiting import blocking_until, until

PROGRAM = CACHE / "otel/collector"
_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class OtelCollector:
    """One that runs. `port`: of gRPC; `http_port`: of HTTP."""

    folder: Path
    port: int
    http_port: int

    async def spans(self, trace: str) -> list[dict[str, Any]]:
        """Those of a trace, in OTLP's JSON, once the one of the whole activation has come; in the order in which they began."""
        found: list[dict[str, Any]] = []

        def has_come() -> bool:
            found[:] = [span for span in self._spans() if span["traceId"] == trace]
            return any(span["name"] == "activation" for span in found)

        await until(has_come, f"the collector has trace {trace}", _PATIENCE)
        return sorted(found, key=lambda span: int(span["startTimeUnixNano"]))

    def _spans(self) -> Iterator[dict[str, Any]]:
        file = self.folder / "traces.json"
        for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
            if not line.endswith("\n"):
                return  # it is being written
            for of_resource in json.loads(line)["resourceSpans"]:
                for scope in of_resource["scopeSpans"]:
                    yield from scope["spans"]


@contextmanager
def otel_collector(folder: Path, port: int = 0) -> Iterator[OtelCollector]:
    """`folder`: for what it writes. Killed at the end of the block."""
    folder.mkdir(exist_ok=True)
    made = OtelCollector(folder, port or free_port(), free_port())
    protocols = {"grpc": {"endpoint": f"127.0.0.1:{made.port}"}, "http": {"endpoint": f"127.0.0.1:{made.http_port}"}}
    config = {
        "receivers": {"otlp": {"protocols": protocols}},
        "exporters": {"file": {"path": str(folder / "traces.json"), "append": True, "flush_interval": "100ms"}},
        "service": {
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}},
            "telemetry": {"metrics": {"level": "none"}},
        },
    }
    file, log = folder / "config.yaml", folder / "log"
    file.write_text(yaml.safe_dump(config))
    begun = log.stat().st_size if log.exists() else 0
    with log.open("ab") as out, subprocess.Popen([PROGRAM, "--config", f"file:{file}"], stdout=out, stderr=out) as process:
        try:
            is_ready = "Everything is ready"
            blocking_until(lambda: is_ready in log.read_text()[begun:] or process.poll() is not None, "the collector is ready", _PATIENCE)
            assert process.poll() is None, log.read_text()
            yield made
        finally:
            process.kill()
