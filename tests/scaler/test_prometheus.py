"""Queries to a real Prometheus: silent, slow, wrong, without a sample and back."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from scaler.sources.prometheus import PrometheusDeclaration
from tests.worlds.asked_elsewhere import OFTEN, asked_elsewhere, silent_and_back
from tests.worlds.ports import free_port
from tests.worlds.prometheus_server import PrometheusServer, gauge, prometheus_server
from tests.worlds.s3_server import Wire


@pytest.fixture
def target() -> int:
    return free_port()


@pytest.fixture
async def prometheus(tmp_path: Path, target: int) -> AsyncIterator[PrometheusServer]:
    async with prometheus_server(tmp_path, target) as server:
        yield server


def declared(server: PrometheusServer, query: str, **more: Any) -> PrometheusDeclaration:
    return PrometheusDeclaration(**{"type": "prometheus", "url": server.url, "query": query, "interval_seconds": OFTEN} | more)


async def test_a_gauge_its_end_and_its_return(prometheus: PrometheusServer, target: int) -> None:
    """Where its program ends, the query gives nothing: that is no zero."""
    async with asked_elsewhere(declared(prometheus, "queue_depth"), hold_seconds=1) as asked:
        async with gauge("queue_depth", target, "4"):
            await asked.says(4)
        await asked.falls_silent("it gives no sample, which is no zero")
        async with gauge("queue_depth", target, "0.2"):
            await asked.says(1)  # a part of a request is one
        await asked.falls_silent("it gives no sample")
        async with gauge("queue_depth", target, "0"):
            await asked.says(0)


async def test_silent_and_back(prometheus: PrometheusServer) -> None:
    await silent_and_back(declared(prometheus, "vector(7)"), prometheus.process.pid, pending=7)


async def test_killed(prometheus: PrometheusServer) -> None:
    async with asked_elsewhere(declared(prometheus, "vector(7)")) as asked:
        await asked.says(7)
        prometheus.process.kill()
        await asked.fails("Connect call failed")
        assert asked.told.pending == 7, "the last value holds"


async def test_slow_is_not_silent(prometheus: PrometheusServer) -> None:
    wire = Wire(prometheus.port)
    wire.rate = 1500  # bytes a second
    async with wire.laid(), asked_elsewhere(declared(prometheus, "vector(7)", url=wire.endpoint)) as asked:
        await asked.says(7)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("scalar(vector(0)) / 0", "NaN (query scalar(vector(0)) / 0) is no number of requests"),
        ("vector(1) / 0", "+Inf (query vector(1) / 0) is no number of requests"),
        ("vector(-3)", "-3 (query vector(-3)) is no number of requests"),
        ("missing_metric", "it gives no sample, which is no zero"),
        ('vector(1) or label_replace(vector(2), "a", "b", "", "")', "it gives 2 samples: make one of them, by sum(…) or max(…)"),
        ('"words"', "it gives a string"),
        ("vector(1)[1m:]", "it gives a matrix"),
        ("sum(", "failed: invalid parameter"),
    ],
)
async def test_what_is_no_number_of_requests(prometheus: PrometheusServer, query: str, why: str) -> None:
    async with asked_elsewhere(declared(prometheus, query)) as asked:
        await asked.fails(why)
        assert query in asked.state.fault
        assert why in asked.told.unknown


async def test_a_missing_metric_that_means_zero(prometheus: PrometheusServer) -> None:
    async with asked_elsewhere(declared(prometheus, "missing_metric or vector(0)")) as asked:
        await asked.says(0)


@pytest.mark.parametrize(
    "answer", ["<html>login</html>", "[]", '{"status": "success"}', '{"status": "success", "data": {"resultType": "scalar", "result": []}}']
)
async def test_what_is_no_prometheus(answer: str) -> None:
    async def say(_: web.Request) -> web.Response:
        return web.Response(text=answer, status=403)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", say)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with asked_elsewhere(PrometheusDeclaration(type="prometheus", url=url, query="vector(1)")) as asked:
            await asked.fails("status 403, and no answer of Prometheus")
    finally:
        await runner.cleanup()
