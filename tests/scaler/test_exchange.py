"""What of a request reaches the replica, and what of its answer the client: all of it, as it is, and as it comes."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import cast

import aiohttp
import pytest

from tests.worlds.echo_engine import Engine
from tests.worlds.engine_process import process
from tests.worlds.front import front
from tests.worlds.raw_client import raw_client
from tests.worlds.raw_engine import Asked, raw_engine, saying


async def test_passes_the_request_on_untouched() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        body = gzip.compress(b"anything \x00\xff")
        headers = {
            "X-Zerowake-Model": "m",
            "Content-Encoding": "gzip",
            "Content-Type": "application/octet-stream",
            "Accept-Encoding": "br;q=0.5",
            "Cookie": "a=b",
            "Authorization": "Bearer secret",
            "User-Agent": "me",
            "Connection": "keep-alive, X-Mine",
            "X-Mine": "for the gateway's connection only",
            "TE": "trailers",
            "X-Status": "418",
        }
        url = aiohttp.client.URL(f"{f.url}/a/%2F/b%20c/?q=%C3%A9&q=%2b", encoded=True)
        async with f.client.put(url, data=body, headers=headers, skip_auto_headers=["Accept"]) as response:
            seen = await response.json()
            assert response.status == 418
            assert response.headers["X-Engine"] == "yes"
        assert seen["method"] == "PUT"
        assert seen["target"] == "/a/%2F/b%20c/?q=%C3%A9&q=%2b"
        assert bytes.fromhex(seen["body"]) == body
        assert dict(seen["headers"]) == {
            "Host": f.url.removeprefix("http://"),
            "X-Zerowake-Model": "m",
            "Content-Encoding": "gzip",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(body)),
            "Accept-Encoding": "br;q=0.5",
            "Cookie": "a=b",
            "Authorization": "Bearer secret",
            "User-Agent": "me",
            "X-Status": "418",
            "X-Forwarded-For": "127.0.0.1",
            "X-Forwarded-Proto": "http",
            "X-Forwarded-Host": f.url.removeprefix("http://"),
        }


async def test_adds_nothing_to_a_bare_request_but_its_way() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        reader, writer = await asyncio.open_connection(*f.url.removeprefix("http://").split(":"))
        writer.write(b"GET /models/m/bare HTTP/1.0\r\n\r\n")
        answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert answer[0].startswith(b"HTTP/1.0 200 ")
        told = json.loads(answer[2])
        assert told["target"] == "/bare"
        # HTTP/1.1 demands a host; it is the engine's own
        assert [name for name, _ in told["headers"]] == ["Host", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Prefix"]


async def test_an_answer_without_a_body_stays_one() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        async with f.client.head(f"{f.url}/models/m/x") as response:
            assert (response.status, await response.read()) == (200, b"")
            assert int(response.headers["Content-Length"]) > 0
        async with f.client.get(f"{f.url}/models/m/x", headers={"X-Status": "204"}) as response:
            assert (response.status, await response.read()) == (204, b"")


async def test_each_piece_of_an_answer_arrives_while_the_next_is_held_back() -> None:
    async with Engine(held=True) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "one two three"}]}
        engine.say()
        async with asyncio.timeout(10), f.client.post(f"{f.url}/v1/chat/completions", json=body) as response:
            for word in ("one", "two", "three"):
                line = await response.content.readuntil(b"\n\n")
                assert json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == word
                engine.say()
            assert await response.content.read() == b"data: [DONE]\n\n"
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"


async def test_a_streamed_body_reaches_the_engine_before_its_end() -> None:
    async with Engine() as engine, front(body_bytes=1000) as f:
        f.dispatcher.add(engine.replica())
        answered: asyncio.Queue[int] = asyncio.Queue()

        async def upload():  # type: ignore[no-untyped-def]
            for size in (3, 5000, 1):
                yield b"x" * size
                told = 0
                async with asyncio.timeout(10):
                    while told < size:  # each chunk is sent only after the engine has told of the one before
                        told += await answered.get()

        async with asyncio.timeout(10), f.client.post(f"{f.url}/models/m/upload", data=upload()) as response:
            async for line in response.content:
                answered.put_nowait(int(line))


async def test_heartbeats_while_held() -> None:
    async with Engine() as engine, front() as f:
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "one two"}]}
        headers = {"X-Zerowake-Heartbeat": "0.1"}
        async with asyncio.timeout(10), f.client.post(f"{f.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == b": waiting\n\n"
            f.dispatcher.add(engine.replica())
            rest = (await response.content.read()).replace(b": waiting\n\n", b"")
        assert [event[:6] for event in rest.split(b"\n\n")] == [b"data: ", b"data: ", b"data: ", b""]
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_errors_after_a_heartbeat_are_events() -> None:
    async with Engine() as engine, front(max_wait_seconds=0.05) as f:
        answer = await f.ask(stream=True, X_Zerowake_Heartbeat="10")
        assert answer.status == 200
        comment, event, end = answer.body.replace(b"\n\n\n\n", b"\n\n").split(b"\n\n")
        assert (comment, end) == (b": waiting", b"")
        assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "no_replica"
        f.ledger.declare("m", type(f.ledger.limits("m"))())
        asked = f.ask("fail", stream=True, X_Zerowake_Heartbeat="10")
        await f.held(1)
        f.dispatcher.add(engine.replica())
        event = (await asked).body.split(b"data: ")[1]
        assert json.loads(event)["error"]["code"] == "told"


@pytest.mark.parametrize("patient", [False, True])
async def test_a_replica_killed_in_the_middle_of_an_answer(patient: bool) -> None:
    """The client can tell that its answer is not whole: it has no proper end, or an error event where the client agreed to events."""
    async with process("held") as engine, front() as f:
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "one two"}]}
        headers = {"X-Zerowake-Heartbeat": "60"} if patient else {}
        asked = asyncio.create_task(f.client.post(f"{f.url}/v1/chat/completions", json=body, headers=headers).__aenter__())
        await f.held(1)
        f.dispatcher.add(engine.replica("r1"))
        async with f.client.post(f"http://127.0.0.1:{engine.port}/release", data=b"1"):
            pass
        response = await asked
        while b'"content": "one"' not in await response.content.readuntil(b"\n\n"):
            pass
        await engine.kill()
        await hears_of_the_end(response, patient)


async def hears_of_the_end(response: aiohttp.ClientResponse, patient: bool) -> None:
    """In the middle of an answer: by an event where its client may be told so, else by the connection."""
    if patient:
        error = (await response.content.read()).removeprefix(b"\n\ndata: ")
        assert json.loads(error)["error"]["code"] == "replica_failed"
    else:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.read()


async def test_a_streaming_body_is_not_sent_twice() -> None:
    died = asyncio.Event()

    async def die(asked: Asked) -> None:
        await asked.reader.readexactly(4)
        asked.reset()
        died.set()

    async with raw_engine(die) as dying, Engine() as living, front() as f:
        f.dispatcher.add(dying.replica("dying"))

        async def upload() -> AsyncIterator[bytes]:
            yield b"part"
            await died.wait()
            f.dispatcher.add(living.replica("living"))
            yield b"rest"

        async with f.client.post(f"{f.url}/models/m/x", data=upload()) as response:
            assert response.status == 502
            assert "cannot be sent again" in (await response.json())["error"]["message"]
        assert living.seen.empty()


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("way", ["removed", "closed"])
async def test_a_replica_that_is_let_go_in_the_middle_of_an_answer(way: str, patient: bool) -> None:
    """However the gateway takes leave of a replica, the client of an answer that is under way hears of its end at once."""
    async with Engine(held=True) as engine, front() as f:
        engine.say()
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "one two"}]}
        headers = {"X-Zerowake-Heartbeat": "60"} if patient else {}
        asked = asyncio.create_task(f.client.post(f"{f.url}/v1/chat/completions", json=body, headers=headers).__aenter__())
        await f.held(1)
        f.dispatcher.add(engine.replica("r1"))
        response = await asked
        while b'"content": "one"' not in await response.content.readuntil(b"\n\n"):
            pass
        if way == "removed":
            f.dispatcher.remove("r1")
        else:
            await f.dispatcher.close()
        async with asyncio.timeout(1):
            await hears_of_the_end(response, patient)
            await f.until(lambda demand: demand.in_flight == 0)
            assert await engine.left.get() == "one two"


UNREADABLE = {
    "no HTTP": b"220 smtp.example ready\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi!",
    "a length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nhi",
    "a coding nobody asked for": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "a status that is none": b"HTTP/1.1 20 OK\r\n\r\n",
    "a NUL": b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "two megabytes of head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**21 + b"\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("said", UNREADABLE.values(), ids=UNREADABLE)
async def test_an_answer_that_cannot_be_passed_on_is_asked_for_once_and_says_why(said: bytes) -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    async with raw_engine(saying(said, good)) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        answer = await f.ask()
        assert (answer.status, answer.error["code"]) == (502, "bad_answer")
        assert "cannot be passed on: it" in answer.error["message"]
        assert len(engine.heads) == 1
        assert f.dispatcher.take("m") is not None  # it is not suspected
        assert (await f.ask()).body == b"hi"


@pytest.mark.parametrize("size", [9_000, 500_000])
async def test_an_answer_with_a_large_field(size: int) -> None:
    said = b"HTTP/1.1 200 OK\r\nX-Large: " + b"x" * size + b"\r\nContent-Length: 2\r\n\r\nhi"
    async with raw_engine(saying(said)) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get()
        assert b"X-Large: " + b"x" * size + b"\r\n" in await client.head()
        assert await client.exactly(2) == b"hi"


@pytest.mark.parametrize("target", ["/echo?", "/echo?&&a=%2B+b", "/echo??x", "/echo", "/a//b/../c?x=http://y/z#f"])
async def test_a_query_is_kept_exactly(target: str) -> None:
    async with raw_engine(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        for prefix in ("/models/m", f"{f.url}/models/m", ""):
            client.get(prefix + target, b"X-Zerowake-Model: m")
            await client.head()
        for head in engine.heads:
            assert head.startswith(f"GET {target} HTTP/1.1\r\n".encode())


async def test_a_redirect_stays_under_the_prefix_and_the_way_is_told() -> None:
    said = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /docs/\r\nContent-Length: 0\r\n\r\n"
    async with raw_engine(saying(said)) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get("/models/m/docs", b"X-Forwarded-For: 6.6.6.6", b"Connection: X-Forwarded-Proto")
        assert (await client.begun()).headers["location"] == "/models/m/docs/"
        assert b"X-Forwarded-For: 6.6.6.6, 127.0.0.1\r\n" in engine.heads[0]
        assert b"X-Forwarded-Prefix: /models/m\r\n" in engine.heads[0]
        client.get("/docs", b"X-Zerowake-Model: m")
        assert (await client.begun()).headers["location"] == "/docs/"


async def test_a_requests_bytes_are_passed_on_as_they_are() -> None:
    async with raw_engine(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        fields = [b"X-A: caf\xe9", b"x-a: caf\xc3\xa9", b"X-B: \xff\xfe\x80", b"X-Empty: ", b"Cookie: a=1", b"Cookie: b=2"]
        client.get("/models/m/x?q=%C3%A9", *fields, b"Keep-Alive: 5", b"Connection: keep-alive, X-Mine", b"X-Mine: 1", b"TE: trailers")
        await client.head()
        lines = engine.heads[0].split(b"\r\n")
        assert lines[: 2 + len(fields)] == [b"GET /x?q=%C3%A9 HTTP/1.1", b"Host: gateway", *fields]
        assert all(line.startswith(b"X-Forwarded-") for line in lines[2 + len(fields) : -2])


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "GET", "DELETE", "OPTIONS"])
async def test_a_request_without_a_body_says_so_where_its_method_may_have_one(method: str) -> None:
    async with raw_engine(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get(method=method)
        await client.head()
        assert (b"Content-Length: 0\r\n" in engine.heads[0]) == (method in ("POST", "PUT", "PATCH"))


async def test_streamed_uploads_never_meet_an_idle_connection_that_is_being_closed() -> None:
    """An engine that keeps connections for a moment only: what is held whole may be sent again, an upload may not."""

    async def serve(asked: Asked) -> None:
        size = 0
        if b"chunked" in asked.head:
            while (line := await asked.reader.readline()) != b"0\r\n":
                size += len(await asked.reader.readexactly(int(line, 16) + 2)) - 2
            await asked.reader.readline()
        else:
            size = len(await asked.reader.readexactly(asked.length))
        asked.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n%4d" % size)
        await asked.writer.drain()
        cast(asyncio.Transport, asked.writer.transport).pause_reading()  # what comes in that moment is not read
        await asyncio.sleep(0.001)
        asked.writer.close()

    async def upload() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        yield b"y" * 24

    async with raw_engine(serve) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        for turn in range(150):
            if turn % 3 == 0:
                assert (await f.ask()).status == 200
            await asyncio.sleep(0.0005 * (turn % 5))  # all about the moment in which the engine closes
            async with f.client.post(f"{f.url}/models/m/x", data=upload()) as response:
                assert (response.status, await response.read()) == (200, b"1024")
        assert len(engine.heads) == 200


@pytest.mark.parametrize("sized", [False, True])
async def test_an_engine_that_answers_before_the_upload_has_ended(sized: bool) -> None:
    async def serve(asked: Asked) -> None:
        asked.writer.write(b"HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 3\r\n\r\nno!")
        await asked.writer.drain()
        asked.writer.close()  # what comes of the upload is answered with a reset

    async def upload() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 2**14

    async with raw_engine(serve) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        for _ in range(20):
            headers = {"Content-Length": str(2**20)} if sized else {}
            async with f.client.post(f"{f.url}/models/m/x", data=upload(), headers=headers) as response:
                assert (response.status, await response.read()) == (401, b"no!")
        assert len(engine.heads) == 20
