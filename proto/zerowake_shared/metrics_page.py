"""The page of metrics that Prometheus reads, in the format that it asks for: OpenMetrics has exemplars, the older text has not."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder


def metrics_page(request: web.Request, registry: CollectorRegistry = REGISTRY) -> web.Response:
    """All that the registry has now."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(registry), headers={"Content-Type": content_type})
