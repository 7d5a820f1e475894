"""Debian's Prometheus, as a process of its own, and a program whose one gauge it reads every tenth of a second.

The program comes out of its package, unpacked and not installed (tests/worlds/prometheus.sh): no service of it begins to run.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from aiohttp import web

from tests.worlds.ports import free_port

_UNPACKED = Path(__file__).parents[2] / ".cache/prometheus/usr/bin"


def program(name: str) -> str:
    """Where one of the package's programs is: prometheus, promtool."""
    unpacked = _UNPACKED / name
    found = str(unpacked) if unpacked.exists() else shutil.which(name)
    assert found, f"{unpacked} is missing: `make test` brings it, or tests/worlds/prometheus.sh"
    return found


@dataclass
class PrometheusServer:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.asynccontextmanager
async def prometheus_server(
    folder: Path, *targets: int | str, every: str = "100ms", rules: Path | None = None
) -> AsyncIterator[PrometheusServer]:
    """targets: what it scrapes, as host:port, or by a port of this machine. every: how often it does, and looks at the rules."""
    port = free_port()
    config = folder / "prometheus.yml"
    times = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    addresses = [target if isinstance(target, str) else f"127.0.0.1:{target}" for target in targets]
    job = {"job_name": "queue", "static_configs": [{"targets": addresses}]}
    config.write_text(yaml.safe_dump({"global": times, "scrape_configs": [job], "rule_files": [str(rules)] if rules else []}))
    where = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log, subprocess.Popen([program("prometheus"), *where], stdout=log, stderr=log) as process:
        made = PrometheusServer(port, process)
        try:
            yield made
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def gauge(name: str, port: int, value: str) -> AsyncIterator[None]:
    """A program of whose metrics one is so."""
    app = web.Application()

    async def show(_: web.Request) -> web.Response:
        return web.Response(text=f"# TYPE {name} gauge\n{name} {value}\n")

    app.router.add_get("/metrics", show)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield
    finally:
        await runner.cleanup()
