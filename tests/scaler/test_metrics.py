"""The ledger's numbers for Prometheus, and the server that shows them."""

import json
import re
import subprocess
from pathlib import Path

import aiohttp
import yaml
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.forecast.forecast import Forecast
from scaler.keda.metrics import STREAMS_OPEN
from scaler.kubernetes.first_replica import ACTIVATED
from scaler.sources.watch import Sources
from scaler.view.metrics import ForecastCollector, LedgerCollector, SourcesCollector, serve_metrics
from tests.worlds.prometheus_server import program

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


async def test_alerts_ask_for_numbers_that_there_are() -> None:
    """In a process of `zerowake serve`, before any KEDA came."""
    counted = {name for collector in (STREAMS_OPEN, ACTIVATED) for name in (each.name for each in collector.collect())}
    ledger = Ledger()
    async with Sources(ledger) as sources:
        registered = counted | {
            each.name for collector in (LedgerCollector(ledger), SourcesCollector(sources)) for each in collector.collect()
        }
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    for rule in rules:
        for name in re.findall(r"zerowake_\w+", rule["expr"]):
            assert name.removesuffix("_total") in registered, f"{rule['alert']} asks for {name}"
    assert 'zerowake_keda_streams_open{rpc="StreamIsActive"} 0.0' in generate_latest(REGISTRY).decode(), "no answer would raise no alert"


_SILENT_FOR = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'zerowake_source_up{{model="m", source="redis", instance="a"}}', values: "1x3 0x10 1x5"}}
      - {{series: 'zerowake_source_up{{model="m", source="redis", instance="b"}}', values: "1x20"}}
      - {{series: 'zerowake_source_up{{model="m", source="cron", instance="a"}}', values: "1x20"}}
      - {{series: 'zerowake_source_up{{model="n", source="redis", instance="a"}}', values: "1x3 0x2 1x15"}}
    alert_rule_test:
      - {{alertname: ZerowakeSourceSilent, eval_time: 8m, exp_alerts: []}}
      - eval_time: 10m
        alertname: ZerowakeSourceSilent
        exp_alerts:
          - exp_labels: {{severity: warning, model: m, source: redis}}
            exp_annotations:
              summary: Source redis of m is not heard of
              description: {description}
      - {{alertname: ZerowakeSourceSilent, eval_time: 16m, exp_alerts: []}}
"""


def test_a_source_that_one_replica_does_not_hear_raises_an_alert_after_a_while(tmp_path: Path) -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    (description,) = (rule["annotations"]["description"] for rule in rules if rule["alert"] == "ZerowakeSourceSilent")
    test = tmp_path / "test.yaml"
    test.write_text(_SILENT_FOR.format(rules=RULES, description=json.dumps(description)))
    for command in (["check", "rules", RULES], ["test", "rules", test]):
        done = subprocess.run([program("promtool"), *command], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
