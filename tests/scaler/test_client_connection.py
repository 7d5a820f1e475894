"""Requests that cannot be read, and clients that close their sending half."""

import asyncio
import contextlib
import json
import logging

import pytest

from scaler.gateway import client_connection
from scaler.gateway.client_connection import HEADER_BYTES, LINE_BYTES
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front
from tests.worlds.raw_client import raw_client

SECRET = b"s3cr3t" * 1500
POST = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nX-Zerowake-Model: m\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + SECRET + b"\r\n\r\n", 431, f"longer than {HEADER_BYTES}"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-" + SECRET + b": x\r\n\r\n", 431, f"longer than {HEADER_BYTES}"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Key: s3cr3t\r\n" * 200 + b"\r\n", 431, "more than 128 headers"),
        (b"GET /?key=" + SECRET * 2 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, f"longer than {LINE_BYTES}"),
        (b"s3cr3t / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "method"),
        (b"\x16\x03\x01\x00s3cr3t\r\n\r\n", 400, "HTTPS"),
        (b"GET / HTTP/s3cr3t\r\nHost: x\r\n\r\n", 400, "HTTP"),
        (b"GET s3cr3t HTTP/1.1\r\nHost: x\r\n\r\n", 400, ""),
        (b"GET / HTTP/1.1\r\nX-Key: s3cr3t\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: s3cr3t\r\n\r\n", 400, "Duplicate"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Key: s3cr3t\x00\r\n\r\n", 400, "header"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX Key: s3cr3t\r\n\r\n", 400, "header"),
        (POST + b"Content-Length: s3cr3t\r\n\r\n", 400, "Content-Length"),
        (POST + b"Content-Length: -1\r\n\r\n", 400, "Content-Length"),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, ""),
        (POST + b"Transfer-Encoding: chunked\r\n\r\ns3cr3t\r\n\r\n", 400, "chunk"),
        (b"POST /v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcs3cr3t", 400, ""),
    ],
)
async def test_a_request_that_cannot_be_read(sent: bytes, status: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with Engine() as engine, front() as f, asyncio.timeout(10), raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.send(sent)
        answer = await client.answer()
        assert (answer.version, answer.status) == ("HTTP/1.1", status)
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.error["type"] == "invalid_request_error"
        assert said.lower() in answer.error["message"].lower()
        assert b"s3cr3t" not in answer.body
        assert await client.rest() == b""
    assert "s3cr3t" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_body_that_breaks_off_in_a_bad_chunk_ends_the_engines_work() -> None:
    async with Engine() as engine, front() as f, asyncio.timeout(10), raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await f.until(lambda demand: demand.in_flight == 1)
        client.send(b"s3cr3t\r\n")
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (400, "bad_body")
        assert b"s3cr3t" not in answer.body
        assert await client.rest() == b""
        await f.until(lambda demand: demand.pending == 0)


async def test_a_fault_of_ours_is_told_in_the_apis_json(monkeypatch: pytest.MonkeyPatch) -> None:
    async with front() as f, asyncio.timeout(10):
        monkeypatch.setattr("scaler.gateway.routing.known", None)
        async with f.client.post(f"{f.url}/x", json={"model": "m"}) as response:
            assert response.status == 500
            assert (await response.json())["error"]["code"] == "internal_error"


def _asks(text: str = "hello", *, stream: bool = False, version: str = "1.1") -> bytes:
    body = json.dumps({"model": "m", "stream": stream, "messages": [{"role": "user", "content": text}]}).encode()
    return f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_closes_its_sending_half_gets_its_answer(version: str) -> None:
    async with Engine() as engine, front() as f, asyncio.timeout(20):
        f.dispatcher.add(engine.replica())
        for _ in range(50):
            async with raw_client(f.url) as client:
                client.send(_asks(version=version))
                client.writer.write_eof()
                assert (await client.answer()).status == 200
                assert await client.rest() == b""


async def test_all_that_it_asked_for_is_answered() -> None:
    async with Engine() as engine, front() as f, asyncio.timeout(10), raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.send(_asks("one") + _asks("two") + _asks("three"))
        client.writer.write_eof()
        for text in (b"one", b"two", b"three"):
            assert text in (await client.answer()).body
        assert await client.rest() == b""


async def test_it_gets_its_answer_from_zero_and_is_asked_meanwhile_whether_it_is_there() -> None:
    async with Engine(held=True) as engine, front() as f, asyncio.timeout(20), raw_client(f.url) as client:
        client.send(_asks(stream=True))
        client.writer.write_eof()
        await f.held(1)
        assert (await client.begun()).status == 100
        f.dispatcher.add(engine.replica())
        await engine.seen.get()
        assert (await client.begun()).status == 100
        engine.say(1)
        answer = await client.answer()
        assert answer.status == 200
        assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_an_upload_whose_client_has_said_all_waits_unread() -> None:
    async with Engine() as engine, front() as f, asyncio.timeout(20), raw_client(f.url) as client:
        client.send(b"POST /models/m/x HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2_000_000)
        client.writer.write_eof()
        await f.held(1)
        assert (await client.begun()).status == 100
        f.dispatcher.add(engine.replica())
        assert (await client.answer()).status == 200


async def test_a_client_that_leaves_after_closing_its_sending_half_is_noticed() -> None:
    async with Engine(held=True) as engine, front() as f, asyncio.timeout(20):
        f.dispatcher.add(engine.replica())
        async with raw_client(f.url) as client:
            client.send(_asks())
            client.writer.write_eof()
            await engine.seen.get()
            assert (await client.begun()).status == 100
        assert await engine.left.get() == "hello"
        await f.until(lambda demand: demand.pending == 0)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("begun", [False, True], ids=["before its answer", "in the middle of it"])
async def test_a_client_that_closes_its_connection_has_left(version: str, begun: bool) -> None:
    """As most do: an end of file, and no reset before something is sent to them."""
    async with Engine(held=True) as engine, front() as f, asyncio.timeout(20):
        f.dispatcher.add(engine.replica())
        async with raw_client(f.url) as client:
            client.send(_asks("one two", stream=True, version=version))
            await engine.seen.get()
            if begun:
                engine.say(1)
                assert (await client.begun()).status == 200
                await client.reader.readuntil(b"\n\n")
            client.writer.close()
            assert await engine.left.get() == "one two"
        await f.until(lambda demand: demand.pending == 0)


async def test_a_client_that_leaves_in_the_middle_of_its_body_asks_for_nothing() -> None:
    async with Engine() as engine, front() as f, asyncio.timeout(10), raw_client(f.url) as client:
        client.send(POST + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        client.writer.write_eof()
        assert await client.rest() == b""
        assert engine.seen.empty()


@pytest.mark.parametrize("before", [False, True], ids=["as its first request", "after another one"])
async def test_a_head_that_comes_byte_by_byte_is_given_up(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "HEAD_SECONDS", 0.3)
    async with Engine() as engine, front() as f, asyncio.timeout(20), raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        if before:
            client.send(_asks())
            assert (await client.answer()).status == 200

        async def trickle() -> None:
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            while True:
                client.send(b"a")
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        answer = await client.answer()
        trickling.cancel()
        assert (answer.status, answer.error["code"], answer.headers["connection"]) == (408, "head_timeout", "close")
        with contextlib.suppress(ConnectionResetError):  # what it had sent meanwhile
            assert await client.rest() == b""


async def test_a_head_in_two_parts_is_in_time_and_the_deadline_is_over_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "HEAD_SECONDS", 1.0)
    async with Engine(held=True) as engine, front() as f, asyncio.timeout(20), raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        asked = _asks()
        client.send(asked[:20])
        await asyncio.sleep(0.1)
        client.send(asked[20:])
        await engine.seen.get()
        await asyncio.sleep(1.2)
        engine.say()
        assert (await client.answer()).status == 200
        await asyncio.sleep(1.2)  # nor does it begin where nothing was sent, or an empty line
        client.send(b"\r\n")
        await asyncio.sleep(1.2)
        client.send(_asks())
        engine.say()
        assert (await client.answer()).status == 200
