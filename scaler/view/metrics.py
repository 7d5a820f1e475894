"""The small server that shows what this process counts, and the ledger's numbers. Alerts and dashboards build on these names.

Numbers that the ledger already has (held, in flight, replicas) are read from it when Prometheus asks, so they cost a request nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from scaler.books.demand import DemandReader
from scaler.fleet.planner import Planner
from scaler.fleet.staging_ahead import StagingAhead
from scaler.forecast.forecast import Forecast
from scaler.plan.world import Node
from scaler.sources.watch import Sources
from zerowake_shared.metrics_page import metrics_page
from zerowake_shared.web_server import served


class LedgerCollector(Collector):
    """The ledger's numbers as gauges."""

    def __init__(self, ledger: DemandReader) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[GaugeMetricFamily]:
        held = GaugeMetricFamily("zerowake_held_requests", "Requests that wait for a replica.", labels=["model"])
        size = GaugeMetricFamily("zerowake_held_bytes", "Bytes of the bodies of requests that wait for a replica.", labels=["model"])
        flying = GaugeMetricFamily("zerowake_in_flight_requests", "Requests that a replica works on.", labels=["model"])
        replicas = GaugeMetricFamily("zerowake_replicas", "Replicas that are ready or draining.", labels=["model"])
        for model in self._ledger.models():
            demand = self._ledger.demand(model)
            held.add_metric([model], demand.held)
            size.add_metric([model], self._ledger.held_bytes(model))
            flying.add_metric([model], demand.in_flight)
            replicas.add_metric([model], demand.replicas)
        yield from (held, size, flying, replicas)


class SourcesCollector(Collector):
    """What is known of the sources of demand. One that is unknown has no value, and one that never spoke no age."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["model", "source"]
        up = GaugeMetricFamily(
            "zerowake_source_up", "1: the source's last value counts, and nothing failed since; 0: it does not.", labels=labels
        )
        age = GaugeMetricFamily("zerowake_source_age_seconds", "Age of the source's last value.", labels=labels)
        pending = GaugeMetricFamily("zerowake_source_pending", "Requests that count by the source.", labels=labels)
        replicas = GaugeMetricFamily("zerowake_source_replicas", "Replicas that are to be there by the source.", labels=labels)
        for model, states in self._sources.states().items():
            for state in states:
                up.add_metric([model, state.name], state.up)
                if state.age_seconds is not None:
                    age.add_metric([model, state.name], state.age_seconds)
                if state.reading is not None:
                    pending.add_metric([model, state.name], state.reading.pending)
                    replicas.add_metric([model, state.name], state.reading.replicas)
        yield from (up, age, pending, replicas)


class ForecastCollector(Collector):
    """What the forecast was worth so far. A rate of the losses of one, beside that of the other, shows it over any time."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast

    def collect(self) -> Iterator[Metric]:
        score = self._forecast.score
        statements = CounterMetricFamily(
            "zerowake_forecast_statements", "Minutes of idle models of which it was stated how likely a request was, and that are over."
        )
        statements.add_metric([], score.statements)
        expected = CounterMetricFamily("zerowake_forecast_expected_requests", "Requests that these statements add up to.")
        expected.add_metric([], score.expected)
        requests = CounterMetricFamily(
            "zerowake_forecast_requests", "Such minutes in which a request came, by whether one was foretold.", labels=["foretold"]
        )
        requests.add_metric(["yes"], score.hits)
        requests.add_metric(["no"], score.misses)
        alarms = CounterMetricFamily("zerowake_forecast_false_alarms", "Such minutes in which one was foretold, and none came.")
        alarms.add_metric([], score.false_alarms)
        loss = CounterMetricFamily(
            "zerowake_forecast_loss_nats", "Log loss of these statements, and of each model's mean rate in their place.", labels=["of"]
        )
        loss.add_metric(["forecast"], score.loss)
        loss.add_metric(["mean_rate"], score.baseline_loss)
        worth = GaugeMetricFamily("zerowake_forecast_worth_it", "1: of late it was better than the mean rates; 0: it was not, or is new.")
        worth.add_metric([], self._forecast.is_worth_it())
        seasonal = GaugeMetricFamily("zerowake_forecast_seasonal_models", "Models for which the season counts.", labels=["season"])
        for season, models in self._forecast.seasonal.items():
            seasonal.add_metric([season], models)
        yield from (statements, expected, requests, alarms, loss, worth, seasonal)


class AheadCollector(Collector):
    """What was moved ahead of need by the forecast's word, and what came of it."""

    def __init__(self, staging_ahead: StagingAhead) -> None:
        self._ahead = staging_ahead

    def collect(self) -> Iterator[Metric]:
        active = GaugeMetricFamily(
            "zerowake_ahead_active",
            "1: by the forecast snapshots go into memory ahead of need. 0: it has not earned it, or another one does.",
        )
        active.add_metric([], self._ahead.is_active)
        fetched = CounterMetricFamily("zerowake_ahead_fetched_bytes", "Bytes of images and weights that were staged ahead of need.")
        fetched.add_metric([], self._ahead.fetched_bytes)
        wasted = CounterMetricFamily("zerowake_ahead_wasted_bytes", "Those of them that left memory before a request came.")
        wasted.add_metric([], self._ahead.wasted_bytes)
        hits = CounterMetricFamily("zerowake_ahead_hits", "Requests for idle models that found what was staged ahead of need.")
        hits.add_metric([], self._ahead.hits)
        yield from (active, fetched, wasted, hits)


class AgentsCollector(Collector):
    """Which nodes' agents are heard."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = nodes

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "zerowake_agent_up", "1: the agent of this node says what it has; 0: it does not, or not yet.", labels=["node"]
        )
        for node in self._nodes:
            up.add_metric([node.called], node.synced)
        yield up


class StagingCollector(Collector):
    """What agents were asked to stage and have not done yet."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def collect(self) -> Iterator[Metric]:
        stagings = self._planner.stagings()
        count = GaugeMetricFamily("zerowake_plan_stagings_under_way", "Snapshots that go up to a rung of a node now.")
        count.add_metric([], len(stagings))
        age = GaugeMetricFamily("zerowake_plan_staging_oldest_seconds", "For how long the longest of them has been under way; 0: none is.")
        age.add_metric([], max(stagings, default=0.0))
        yield from (count, age)


@asynccontextmanager
async def serve_metrics(
    host: str, port: int, ready: Callable[[], str], registry: CollectorRegistry = REGISTRY, routes: Iterable[web.RouteDef] = ()
) -> AsyncIterator[tuple[str, int]]:
    """Serves /metrics, /healthz and /readyz; yields the bound address (port 0: any).

    ready: why this program is not ready to be sent requests; empty: it is. routes: what is served besides. Raises: CannotListen.
    """

    async def metrics(request: web.Request) -> web.Response:
        return metrics_page(request, registry)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reason = ready()
        return web.Response(text=f"not ready: {reason}\n", status=503) if reason else web.Response(text="ok\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz), *routes])
    async with served(app, host, port, "the metrics' server") as bound:
        yield bound
