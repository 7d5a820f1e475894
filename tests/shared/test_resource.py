"""Where the API has objects, and how it writes times."""

import pytest

from zerowake_shared.kubernetes.resource import EVENTS, PODS, Resource, timestamp


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (PODS.path(), "/api/v1/pods"),
        (PODS.path("tenant"), "/api/v1/namespaces/tenant/pods"),
        (PODS.path("tenant", "chat", "status"), "/api/v1/namespaces/tenant/pods/chat/status"),
        (EVENTS.path("tenant"), "/apis/events.k8s.io/v1/namespaces/tenant/events"),
        (Resource("v1", "Node", "nodes").path(name="n1"), "/api/v1/nodes/n1"),
    ],
)
def test_paths(path: str, expected: str) -> None:
    assert path == expected


def test_times() -> None:
    assert timestamp(0.25) == "1970-01-01T00:00:00Z"
    assert timestamp(1764000000.123456, "microseconds") == "2025-11-24T16:00:00.123456Z"
