"""What a client is told when the gateway refuses its request."""

import json

import pytest

from scaler.gateway.refusal import Refusal


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (404, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")]
)
async def test_it_is_an_error_of_openais_api(status: int, kind: str) -> None:
    response = Refusal(status, "why", "told to", param="model").response
    assert (response.status, response.content_type) == (status, "application/json")
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {"error": {"message": "told to", "type": kind, "param": "model", "code": "why"}}


async def test_only_what_may_go_better_later_says_so() -> None:
    assert int(Refusal(503, "why", "told to", retry=True).response.headers["Retry-After"]) > 0
    assert "Retry-After" not in Refusal(404, "why", "told to").response.headers
