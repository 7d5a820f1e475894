"""The page of metrics comes in the format that is asked for, and exemplars in the one that has them."""

from __future__ import annotations

from aiohttp.test_utils import make_mocked_request
from prometheus_client import CollectorRegistry, Histogram

from zerowake_shared.metrics_page import metrics_page

_OPEN = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"


def page(accept: str) -> tuple[str, str]:
    """Its content type and its text."""
    registry = CollectorRegistry()
    histogram = Histogram("zerowake_test_seconds", "A test's.", registry=registry, buckets=(1.0, 5.0))
    histogram.observe(2.0, exemplar={"activation": "0123456789ab"})
    response = metrics_page(make_mocked_request("GET", "/metrics", headers={"Accept": accept} if accept else {}), registry)
    assert isinstance(response.body, bytes)
    return response.headers["Content-Type"], response.body.decode()


def test_a_prometheus_gets_openmetrics_with_exemplars() -> None:
    kind, text = page(_OPEN)
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert 'zerowake_test_seconds_bucket{le="5.0"} 1.0 # {activation="0123456789ab"} 2.0' in text
    assert text.endswith("# EOF\n")


def test_whoever_asks_for_nothing_gets_the_text_that_all_can_read() -> None:
    for accept in ("", "*/*", "text/plain"):
        kind, text = page(accept)
        assert kind.startswith("text/plain; version=0.0.4")
        assert 'zerowake_test_seconds_bucket{le="5.0"} 1.0\n' in text and "#  {" not in text
