"""The ledger's numbers for Prometheus, and the server that shows them."""

import aiohttp
from prometheus_client import CollectorRegistry

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.view.metrics import LedgerCollector, serve_metrics


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
