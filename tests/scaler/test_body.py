"""Bodies that are read for the model that they name: how much of them, and for how long."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from scaler.gateway import body
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front


async def test_expect_continue_is_answered() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        async with asyncio.timeout(10), f.client.post(f"{f.url}/x", json={"model": "m"}, expect100=True) as response:
            assert "Expect" not in dict((await response.json())["headers"])


async def test_a_body_over_the_bound_is_refused_when_it_says_so_and_when_it_shows() -> None:
    async with front(body_bytes=1000) as f:
        async with f.client.post(f"{f.url}/x", data=b"x" * 1001) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (413, "body_too_large")

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x" * 1000
            yield b"x"

        async with f.client.post(f"{f.url}/x", data=chunks()) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (413, "body_too_large")


async def test_a_body_that_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_IDLE_SECONDS", 0.05)
    forever = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"12345"
        await forever.wait()

    async with front() as f, asyncio.timeout(10), f.client.post(f"{f.url}/x", data=chunks()) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (408, "body_timeout")
        assert "after 5 bytes" in error["message"]
        forever.set()


async def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was refused or has been read counts no more: the next one is read."""
    monkeypatch.setattr(body, "READING_BYTES", 1500)
    more = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await more.wait()

    async with Engine() as engine, front() as f, asyncio.timeout(10):
        f.dispatcher.add(engine.replica())
        first = asyncio.create_task(f.client.post(f"{f.url}/x", headers={"Content-Type": "text/plain"}, data=chunks()))
        while True:  # until the first one's bytes have been read, the second one has room
            async with f.client.post(f"{f.url}/x", data=b"y" * 1000) as response:
                error = (await response.json())["error"]
            if response.status == 429:
                break
            assert error["code"] == "model_missing"
        assert error["code"] == "reading_full"
        more.set()
        assert (await first).status == 400
        async with f.client.post(f"{f.url}/x", json={"model": "m", "x": "z" * 1000}) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    ("headers", "length", "named", "read"),
    [
        ({"Content-Type": "application/json"}, 10, True, True),
        ({"Content-Type": "application/problem+json; charset=utf-8"}, 10, True, True),
        ({"Content-Type": "application/json"}, 101, True, False),
        ({"Content-Type": "application/json"}, None, True, False),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 10, True, False),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 10, True, False),
        ({}, None, False, True),
    ],
)
def test_which_bodies_are_read_for_their_model(headers: dict[str, str], length: int | None, named: bool, read: bool) -> None:
    assert body.read_first(headers, length, 100, named) is read
