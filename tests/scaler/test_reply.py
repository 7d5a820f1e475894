"""What a client gets of an engine's answer, byte for byte, whatever the engine ends its answers by, and whatever the client can read."""

import asyncio
import logging
import socket

import pytest

from scaler.gateway import reply
from tests.worlds.front import front
from tests.worlds.raw_client import RawClient, raw_client
from tests.worlds.raw_engine import Asked, raw_engine, saying

DATE = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
ADDED = b"X-Zerowake-Origin: running\r\n"  # the only thing that the gateway adds to an answer that waited for no replica

CASES = {
    "a length": (
        b"HTTP/1.1 200 Fine\r\n" + DATE + b"Content-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 Fine\r\n" + DATE + b"Content-Length: 5\r\n\r\nhello",
    ),
    "no type, and none is added": (
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 2\r\n\r\nhi",
    ),
    "bytes that are no text, and a field twice": (
        b"HTTP/1.1 200 caf\xe9\r\n"
        + DATE
        + b"X-A: caf\xe9 \xc3\xa9\xff\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 caf\xe9\r\n"
        + DATE
        + b"X-A: caf\xe9 \xc3\xa9\xff\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nContent-Length: 0\r\n\r\n",
    ),
    "chunks with extensions and trailers": (
        b"HTTP/1.1 200 OK\r\n"
        + DATE
        + b"Trailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nX-Sum: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Trailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 9\r\n\r\n",
    ),
    "chunks of nothing": (
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "fields of the connection": (
        b"HTTP/1.1 200 OK\r\n"
        + DATE
        + b"Connection: keep-alive, X-Mine\r\nKeep-Alive: timeout=5\r\nX-Mine: 1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 0\r\n\r\n",
    ),
    "204 with a length": (
        b"HTTP/1.1 204 No Content\r\n" + DATE + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n" + DATE + b"\r\n",
    ),
    "304 with the length of what it stands for": (
        b"HTTP/1.1 304 Not Modified\r\n" + DATE + b"Content-Length: 500\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n" + DATE + b"Content-Length: 500\r\n\r\n",
    ),
    "early hints": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n"
        + DATE
        + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 0\r\n\r\n",
    ),
    "lines without CR, no reason": (
        b"HTTP/1.1 200\n" + DATE.replace(b"\r", b"") + b"Content-Length: 2\n\nhi",
        b"HTTP/1.1 200 \r\n" + DATE + b"Content-Length: 2\r\n\r\nhi",
    ),
}
ENDED_BY_CLOSING = {
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + DATE + b"\r\nhello",
    "HTTP/1.1": b"HTTP/1.1 200 OK\r\n" + DATE + b"Connection: close\r\n\r\nhello",
    "identity": b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: identity\r\n\r\nhello",
}


async def gets(client: RawClient, expected: bytes) -> None:
    assert engines(await client.exactly(len(expected) + len(ADDED))) == expected


def engines(answer: bytes) -> bytes:
    """What of it is the engine's."""
    assert answer.count(ADDED) == 1
    return answer.replace(ADDED, b"")


@pytest.mark.parametrize(("said", "expected"), CASES.values(), ids=CASES)
async def test_an_answer_goes_through_as_it_is_and_the_connection_goes_on(said: bytes, expected: bytes) -> None:
    async with raw_engine(saying(said)) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        for _ in range(3):
            client.get()
            await gets(client, expected)
        assert (len(engine.heads), engine.connections) == (3, 1)


async def test_an_answer_to_head_has_no_body_and_keeps_its_length() -> None:
    said = b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 500\r\n\r\n"
    async with raw_engine(saying(said)) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        for _ in range(3):
            client.get(method="HEAD")
            await gets(client, said)


@pytest.mark.parametrize("said", ENDED_BY_CLOSING.values(), ids=ENDED_BY_CLOSING)
async def test_an_answer_that_ends_with_its_connection(said: bytes) -> None:
    async with raw_engine(saying(said, close=True)) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        for _ in range(2):
            client.get()
            assert (await client.head()).endswith(b"Transfer-Encoding: chunked\r\n\r\n")
            assert b"hello" in await client.until(b"\r\n0\r\n\r\n")
        client.get(version="1.0")
        assert engines(await client.rest()) == b"HTTP/1.0 200 OK\r\n" + DATE + b"\r\nhello"


async def test_a_client_of_http_1_0_gets_no_chunks_and_keeps_its_connection_where_it_can() -> None:
    chunked = b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 5\r\n\r\nhello"
    async with raw_engine(saying(whole, chunked)) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get("/models/m/x", b"Connection: keep-alive", version="1.0")
        await gets(client, b"HTTP/1.0 200 OK\r\n" + DATE + b"Content-Length: 5\r\nConnection: keep-alive\r\n\r\nhello")
        client.get("/models/m/x", b"Connection: keep-alive", b"X-Early: 1", version="1.0")
        assert engines(await client.rest()) == b"HTTP/1.0 200 OK\r\n" + DATE + b"\r\nhello"


async def test_a_date_is_added_where_there_is_none() -> None:
    async with raw_engine(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get()
        lines = (await client.head()).split(b"\r\n")
        assert [line.partition(b":")[0] for line in lines[1:-2]] == [b"Content-Length", b"X-Zerowake-Origin", b"Date"]


CUT_SHORT = {
    "of its length": (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", b""),
    "of its chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b""),
    "of a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello", b""),
    "in nonsense": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"zz\r\n\r\n"),
}


@pytest.mark.parametrize(("said", "more"), CUT_SHORT.values(), ids=CUT_SHORT)
async def test_a_short_answer_is_cut_and_not_completed(said: bytes, more: bytes) -> None:
    passed = asyncio.Event()

    async def serve(asked: Asked) -> None:
        asked.writer.write(said)
        await passed.wait()
        asked.writer.write(more)
        await asked.writer.drain()
        asked.writer.close()

    async with raw_engine(serve) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get()
        await client.until(b"hello")
        passed.set()
        assert b"0\r\n\r\n" not in await client.rest()
        assert len(engine.heads) == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("said", [ENDED_BY_CLOSING["HTTP/1.0"], CUT_SHORT["of its chunks"][0]])
async def test_an_answer_that_breaks_off_is_told_from_one_that_has_ended(said: bytes, version: str) -> None:
    """A client to which the end of the connection is the end of the answer has to get an error instead."""
    reset = asyncio.Event()

    async def serve(asked: Asked) -> None:
        asked.writer.write(said)
        await reset.wait()
        asked.reset()

    async with raw_engine(serve) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get(version=version)
        await client.until(b"hello")
        reset.set()
        if version == "1.0":
            with pytest.raises(ConnectionResetError):
                await client.rest()
        else:
            assert b"0\r\n\r\n" not in await client.rest()


async def test_a_slow_client_slows_the_engine_down_and_fills_no_memory() -> None:
    written = 0

    async def serve(asked: Asked) -> None:
        nonlocal written
        asked.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2**10):
            asked.writer.write(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
            await asked.writer.drain()
            written += 2**16
        asked.writer.write(b"0\r\n\r\n")

    async with raw_engine(serve) as engine, front() as f, raw_client(f.url) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        f.dispatcher.add(engine.replica())
        client.get()
        last = -1
        while written != last:
            last = written
            await asyncio.sleep(0.2)
        assert written < 2**25
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        left = 2**26
        while left:
            left -= (await client.reader.read(2**20)).count(b"x")


async def test_a_slow_client_of_a_replica_that_is_removed_waits_for_nothing() -> None:
    async def serve(asked: Asked) -> None:
        asked.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            asked.writer.write(b"x" * 2**16)
            await asked.writer.drain()

    async with raw_engine(serve) as engine, front() as f, raw_client(f.url) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        f.dispatcher.add(engine.replica())
        client.get()
        await f.until(lambda demand: demand.in_flight == 1)
        for _ in range(100):
            await asyncio.sleep(0.002)
        f.dispatcher.remove("r1")
        await f.until(lambda demand: demand.pending == 0, within=2)


async def test_a_client_that_sends_requests_and_reads_no_answers_fills_no_memory() -> None:
    body = b"x" * 2**18
    said = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with raw_engine(saying(said)) as engine, front() as f, raw_client(f.url) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        f.dispatcher.add(engine.replica())
        for _ in range(1000):
            client.get()
        last = -1
        while len(engine.heads) != last:
            last = len(engine.heads)
            await asyncio.sleep(0.2)
        assert 0 < len(engine.heads) < 100


async def test_a_client_that_takes_nothing_gives_its_place_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(reply, "STALLED_SECONDS", 0.3)

    async def serve(asked: Asked) -> None:
        if asked.number > 1:
            asked.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
            return
        asked.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            asked.writer.write(b"x" * 2**16)
            await asked.writer.drain()

    async with raw_engine(serve) as engine, front(concurrency=1) as f, raw_client(f.url) as stalled, raw_client(f.url) as other:
        f.dispatcher.add(engine.replica())
        stalled.writer.transport.pause_reading()  # type: ignore[attr-defined]
        stalled.get()
        await f.until(lambda demand: demand.in_flight == 1)
        other.get()
        assert (await other.answer()).body == b"hi"
        await engine.ended.get()  # nor does the engine work on for nobody
    assert "has taken nothing of its answer for 0.3 s" in caplog.text
    assert "a replica died" not in caplog.text


async def test_a_client_that_takes_little_is_served_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "STALLED_SECONDS", 0.5)
    size = 2**24
    async with raw_engine(saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        host, _, port = f.url.removeprefix("http://").rpartition(":")
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, b"GET /models/m/x HTTP/1.1\r\nHost: x\r\n\r\n")
            began, got = loop.time(), b""
            while loop.time() < began + 1.5:  # three times as long as one that takes nothing has
                got += await loop.sock_recv(client, 2**17)
                await asyncio.sleep(0.05)
            while got.count(b"x") < size and (more := await loop.sock_recv(client, 2**20)):
                got += more
            assert got.count(b"x") == size
