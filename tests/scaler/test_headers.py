"""The gateway's own headers: how a request wants to be held, and whose turn it takes."""

import pytest

from scaler.books.fairness import Priority
from scaler.gateway import headers
from scaler.gateway.refusal import Refusal


def test_wishes() -> None:
    assert headers.priority({}) is Priority.NORMAL
    assert headers.priority({"X-Zerowake-Priority": " High"}) is Priority.HIGH
    assert headers.heartbeat({}) is None
    assert headers.heartbeat({"X-Zerowake-Heartbeat": "1.5"}) == 1.5
    for bad in ("0", "-1", "nan", "inf", "soon", ""):
        with pytest.raises(Refusal, match="X-Zerowake-Heartbeat must be a number of seconds"):
            headers.heartbeat({"X-Zerowake-Heartbeat": bad})


def test_tenants() -> None:
    assert headers.tenant({}) == "anonymous"
    secret = headers.tenant({"Authorization": "Bearer secret"})
    assert secret == headers.tenant({"Authorization": "Bearer secret"})
    assert secret != headers.tenant({"Authorization": "Bearer other"})
    assert "secret" not in secret
    assert headers.tenant({"Authorization": "Bearer secret", "X-Zerowake-Tenant": "t"}) == "tenant:t"
