"""Pages of other origins: what a browser asks first, and what it needs to show an answer."""

import asyncio

import pytest

from scaler.gateway import cors
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front
from tests.worlds.raw_client import raw_client

PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-zerowake-model",
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/audio/transcriptions", "/models/m/x", "/models/nope/x", "/"])
async def test_a_preflight_is_answered_and_wakes_nobody(path: str) -> None:
    async with front() as f:
        woken: list[str] = []
        f.ledger.on_first_demand(woken.append)
        async with f.client.options(f.url + path, headers=PREFLIGHT) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
            assert response.headers["Access-Control-Allow-Headers"] == PREFLIGHT["Access-Control-Request-Headers"]
            assert "Access-Control-Allow-Credentials" not in response.headers
            assert await response.read() == b""
        assert not woken


async def test_a_preflight_for_a_model_that_is_ready_is_its_engines() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        for path, headers in (("/models/m/x", {}), ("/x", {"X-Zerowake-Model": "m"}), ("/x?model=m", {})):
            async with f.client.options(f.url + path, headers={**PREFLIGHT, **headers}) as response:
                assert response.headers["X-Engine"] == "yes"
        async with f.client.options(f"{f.url}/v1/chat/completions", headers=PREFLIGHT) as response:
            assert "X-Engine" not in response.headers


async def test_options_of_everything() -> None:
    async with front() as f, asyncio.timeout(10), raw_client(f.url) as client:
        client.send(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await client.begun()
        assert (answer.status, answer.headers["allow"]) == (204, cors.METHODS)


async def test_what_the_gateway_says_can_be_read_by_a_page() -> None:
    async with front(max_wait_seconds=0.01) as f:
        for method, path, body in (
            ("GET", "/v1/models", None),
            ("GET", "/v1/models/m", None),
            ("GET", "/v1/models/nope", None),
            ("POST", "/v1/x", b'{"model": "nope"}'),
            ("POST", "/v1/x", b'{"model": "m"}'),
            ("GET", "/v1/files", None),
        ):
            async with f.client.request(method, f.url + path, data=body, headers={"Origin": "https://page.example"}) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "*", path
                assert "Retry-After" in response.headers["Access-Control-Expose-Headers"]


async def test_an_engines_answer_is_its_own() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        async with f.client.post(f"{f.url}/x", json={"model": "m"}, headers={"Origin": "https://page.example"}) as response:
            assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "said"),
    [
        ("DELETE", "/v1/models/m", 405, "method_not_allowed", "can be read only"),
        ("POST", "/v1/models", 405, "method_not_allowed", "can be read only"),
        ("GET", "/v1/files", 400, "model_missing", "this GET has no body that could): name it"),
        ("DELETE", "/v1/files/f1", 400, "model_missing", "X-Zerowake-Model"),
        ("GET", "/v1/responses/r1", 400, "model_missing", "/models/<name>/"),
        ("PUT", "/v1/x", 400, "model_missing", "this PUT"),
    ],
)
async def test_other_methods_are_told_how_a_model_is_named(method: str, path: str, status: int, code: str, said: str) -> None:
    async with front() as f:
        async with f.client.request(method, f.url + path) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (status, code)
            assert said in error["message"]
            assert status != 405 or response.headers["Allow"] == "GET, HEAD, OPTIONS"
        async with f.client.head(f.url + path) as response:
            assert await response.read() == b""


async def test_the_heads_of_own_answers() -> None:
    async with front() as f, asyncio.timeout(10), raw_client(f.url) as client:
        for path, status in (("/v1/models", 200), ("/v1/models/m", 200), ("/v1/models/nope", 404), ("/v1/files", 400)):
            client.get(path, method="HEAD")
            answer = await client.begun()
            assert (answer.status, int(answer.headers["content-length"]) > 0) == (status, True)
