"""The ledger's numbers for Prometheus, and the server that shows them."""

import re
from pathlib import Path

import aiohttp
import yaml
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.keda.metrics import STREAMS_OPEN
from scaler.kubernetes.first_replica import ACTIVATED
from scaler.view.metrics import LedgerCollector, serve_metrics

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


async def test_alerts_ask_for_numbers_that_there_are() -> None:
    """In a process of `zerowake serve`, before any KEDA came."""
    counted = {name for collector in (STREAMS_OPEN, ACTIVATED) for name in (each.name for each in collector.collect())}
    registered = counted | {metric.name for metric in LedgerCollector(Ledger()).collect()}
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    for rule in rules:
        for name in re.findall(r"zerowake_\w+", rule["expr"]):
            assert name.removesuffix("_total") in registered, f"{rule['alert']} asks for {name}"
    assert 'zerowake_keda_streams_open{rpc="StreamIsActive"} 0.0' in generate_latest(REGISTRY).decode(), "no answer would raise no alert"
