"""The ledger's numbers for Prometheus, and the server that shows them."""

from pathlib import Path
from typing import cast

import aiohttp
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.fleet.planner import Planner
from scaler.forecast.forecast import Forecast
from scaler.keda.metrics import STREAMS_OPEN
from scaler.plan.world import Node
from scaler.view.metrics import AgentsCollector, ForecastCollector, LedgerCollector, StagingCollector, serve_metrics

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules.yaml"


async def test_metrics_and_health_are_served() -> None:
    ledger = Ledger({"m": ModelLimits()})
    ledger.hold("m", 7)
    ledger.set_replicas("m", 0, 1)
    registry = CollectorRegistry()
    registry.register(LedgerCollector(ledger))
    why = "still reading its files"
    async with serve_metrics("127.0.0.1", 0, lambda: why, registry) as (host, port), aiohttp.ClientSession() as client:
        async with client.get(f"http://{host}:{port}/metrics") as response:
            text = await response.text()
            assert response.headers["Content-Type"].startswith("text/plain; version=")
        for line in ('zerowake_held_requests{model="m"} 1.0', 'zerowake_held_bytes{model="m"} 7.0', 'zerowake_replicas{model="m"} 1.0'):
            assert line in text
        async with client.get(f"http://{host}:{port}/healthz") as response:
            assert response.status == 200
        async with client.get(f"http://{host}:{port}/readyz") as response:
            assert (response.status, await response.text()) == (503, "not ready: still reading its files\n")
        why = ""
        async with client.get(f"http://{host}:{port}/readyz") as response:
            assert response.status == 200


def test_the_forecast_shows_what_it_was_worth() -> None:
    forecast = Forecast()
    registry = CollectorRegistry()
    registry.register(ForecastCollector(forecast))
    begin = 1_800_000_000.0
    for model in ("m", "n"):
        forecast.declare(model, begin)
    forecast.judge(begin)
    forecast.began("m", begin + 1)
    forecast.judge(begin + 60)
    lines = dict(line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if not line.startswith("#"))
    score = forecast.score
    assert {name: float(value) for name, value in lines.items() if not name.endswith("_created")} == {
        "zerowake_forecast_statements_total": 2.0,
        "zerowake_forecast_expected_requests_total": score.expected,
        'zerowake_forecast_requests_total{foretold="yes"}': 1.0,
        'zerowake_forecast_requests_total{foretold="no"}': 0.0,
        "zerowake_forecast_false_alarms_total": 1.0,
        'zerowake_forecast_loss_nats_total{of="forecast"}': score.loss,
        'zerowake_forecast_loss_nats_total{of="mean_rate"}': score.baseline_loss,
        "zerowake_forecast_worth_it": float(forecast.is_worth_it()),
        'zerowake_forecast_seasonal_models{season="hour"}': 0.0,
        'zerowake_forecast_seasonal_models{season="return"}': 0.0,
        'zerowake_forecast_seasonal_models{season="weekday"}': 0.0,
    }


def test_which_agents_are_heard_and_for_how_long_what_has_been_under_way() -> None:
    class Asked:
        def stagings(self) -> list[float]:
            return under_way

    under_way: list[float] = []
    registry = CollectorRegistry()
    registry.register(AgentsCollector([Node("10.0.0.1:9446", "node-a", synced=True), Node("10.0.0.2:9446")]))
    registry.register(StagingCollector(cast(Planner, Asked())))
    value = registry.get_sample_value
    assert (value("zerowake_agent_up", {"node": "node-a"}), value("zerowake_agent_up", {"node": "10.0.0.2:9446"})) == (1.0, 0.0)
    assert (value("zerowake_plan_stagings_under_way"), value("zerowake_plan_staging_oldest_seconds")) == (0.0, 0.0)
    under_way += [1.0, 6.0, 2.0]
    assert (value("zerowake_plan_stagings_under_way"), value("zerowake_plan_staging_oldest_seconds")) == (3.0, 6.0)


def test_of_no_kedas_streams_there_are_none_and_not_no_answer() -> None:
    """In a process of `zerowake serve`, before any KEDA came: an alert asks."""
    assert STREAMS_OPEN
    assert 'zerowake_keda_streams_open{rpc="StreamIsActive"} 0.0' in generate_latest(REGISTRY).decode()
