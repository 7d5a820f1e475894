"""Bodies that are read for the model that they name: how much of them, and for how long."""

import asyncio
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import brotli
import pytest
from backports import zstd

from scaler.gateway import body
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front
from tests.worlds.raw_client import raw_client


async def test_expect_continue_is_answered() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        async with asyncio.timeout(10), f.client.post(f"{f.url}/x", json={"model": "m"}, expect100=True) as response:
            assert "Expect" not in dict((await response.json())["headers"])


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n", 413, "body_too_large"),
        (b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Encoding: lzma\r\nContent-Length: 10\r\n", 415, "unsupported_encoding"),
        (b"PUT /models/nope/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n", 413, "body_too_large"),
        (b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data\r\nContent-Length: 10\r\n", 400, "bad_form"),
        (b"PUT /models/m/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n", 429, "too_many_requests"),
        (b"PUT /models/m/x HTTP/1.1\r\nHost: x\r\nX-Zerowake-Priority: no\r\nContent-Length: 10\r\n", 400, "bad_priority"),
        (b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n", 405, "method_not_allowed"),
    ],
)
async def test_nothing_is_asked_to_go_on_that_is_refused(head: bytes, status: int, code: str) -> None:
    """Its client may send the body all the same, or not: the connection ends with the answer."""
    async with front(body_bytes=1000, max_requests=1) as f, raw_client(f.url) as client:
        waiting = f.ask()
        await f.held(1)
        client.send(head + b"Expect: 100-continue\r\n\r\n")
        answer = await client.begun()
        assert answer.status == status, "no 100 before it"
        answer.body = await client.exactly(int(answer.headers["content-length"]))
        assert answer.error["code"] == code
        assert answer.headers["connection"] == "close"
        waiting.cancel()


async def test_a_streaming_body_is_asked_for_when_a_replica_takes_it() -> None:
    async with Engine() as engine, front() as f, raw_client(f.url) as client:
        client.send(b"PUT /models/m/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-Continue\r\n\r\n")
        await f.held(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.reader.read(1)
        f.dispatcher.add(engine.replica())
        assert (await client.begun()).status == 100
        client.send(b"hello")
        answer = await client.answer()
        assert bytes.fromhex(json.loads(answer.body)["body"]) == b"hello"


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


async def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never stands still, and would keep what it has of all bodies' bound for hours."""
    monkeypatch.setattr(body, "_SLOWEST", 2**20)
    monkeypatch.setattr(body, "_IDLE_SECONDS", 0.3)
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            yield b"x"
            sent += 1
            await asyncio.sleep(0.01)

    async with front() as f, asyncio.timeout(20), f.client.post(f"{f.url}/x", data=chunks()) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (408, "body_timeout")
        assert "more slowly than" in error["message"]
        assert sent > 3


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


@pytest.mark.parametrize("first", ["model", "file"])
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/files"])
async def test_a_form_names_its_model(path: str, first: str) -> None:
    parts = {"model": "m", "file": io.BytesIO(b"RIFF" * 1000)}
    fields = {name: parts[name] for name in (first, "model" if first == "file" else "file")}
    async with Engine() as engine, front() as f, asyncio.timeout(10):
        f.dispatcher.add(engine.replica())
        async with f.client.post(f.url + path, data=fields) as response:
            seen = await response.json()
        assert (response.status, seen["target"]) == (200, path)
        body = bytes.fromhex(seen["body"])
        headers = {name.lower(): value for name, value in seen["headers"]}
        boundary = headers["content-type"].partition("boundary=")[2].encode()
        assert body.startswith(b"--" + boundary)
        assert body.endswith(b"--" + boundary + b"--\r\n")
        assert b"RIFF" * 1000 in body


async def test_a_form_whose_model_comes_after_a_large_file_costs_no_memory() -> None:
    """It waits in a file, is whole when it is passed on, and the next one goes the same way."""
    size = 100 * 2**20
    block = bytes(range(256)) * 256

    async def chunks(more: bytes) -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(size // len(block)):
            yield block
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n' + more + b"--b--\r\n"

    more = b'--b\r\nContent-Disposition: form-data; name="language"\r\n\r\nen\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with Engine() as engine, front() as f, asyncio.timeout(60):
        f.dispatcher.add(engine.replica())
        before = _resident()
        async with f.client.post(f"{f.url}/upload", data=chunks(more), headers=headers) as response:
            assert response.status == 200, await response.text()
            told = 0
            async for line in response.content:
                told += int(line)
        assert told == size + sum([len(chunk) async for chunk in chunks(more)]) - size
        assert _resident() - before < size / 2


async def test_a_form_that_names_no_model() -> None:
    async with front() as f:
        for data, headers, code, message in (
            ({"file": io.BytesIO(b"x")}, {}, "model_missing", "has no `model`"),
            (b"--b--\r\n", {"Content-Type": "multipart/form-data"}, "bad_form", "boundary"),
            (b"--b\r\nContent-Dispo", {"Content-Type": "multipart/form-data; boundary=b"}, "bad_form", "before its last boundary"),
            (b"no form", {"Content-Type": "multipart/form-data; boundary=b"}, "bad_form", "not the form"),
        ):
            async with f.client.post(f"{f.url}/v1/files", data=data, headers=headers) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (400, code)
                assert message in error["message"]


PACKED = [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress), ("zstd", zstd.compress)]


@pytest.mark.parametrize(("coding", "pack"), [*PACKED, ("X-GZIP", gzip.compress)])
async def test_a_compressed_body_is_looked_into_and_passed_on_as_it_came(coding: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(json.dumps({"model": "m", "x": "y" * 5000}).encode())
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        async with f.client.post(f"{f.url}/x", data=packed, headers=headers) as response:
            seen = await response.json()
        assert bytes.fromhex(seen["body"]) == packed
        assert ["Content-Encoding", coding] in seen["headers"]


async def test_a_coding_that_is_not_unpacked_is_named_or_passed_on() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        for coding in ("lzma", "br, gzip"):
            async with f.client.post(f"{f.url}/x", data=b"packed", headers={"Content-Encoding": coding}) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (415, "unsupported_encoding")
                assert coding in error["message"]
            async with f.client.post(f"{f.url}/models/m/x", data=b"packed", headers={"Content-Encoding": coding}) as response:
                assert bytes.fromhex((await response.json())["body"]) == b"packed"


@pytest.mark.parametrize(("coding", "pack"), PACKED)
async def test_a_bomb_is_refused(coding: str, pack: Callable[[bytes], bytes]) -> None:
    async with front(body_bytes=2**20) as f:
        bomb = pack(b'{"model": "m", "x": "' + b"y" * 2**26)
        for headers in ({}, {"Content-Type": "multipart/form-data; boundary=b"}):
            async with f.client.post(f"{f.url}/x", data=bomb, headers={"Content-Encoding": coding, **headers}) as response:
                assert (response.status, (await response.json())["error"]["code"]) in ((413, "body_too_large"), (400, "bad_form"))


async def test_what_a_decoder_keeps_counts_among_the_bodies_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes are enough to have it kept, for as long as the rest does not come."""
    monkeypatch.setattr(body, "READING_BYTES", 20 * 2**20)
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())

        async def asked() -> int:
            packed = brotli.compress(b'{"model": "m"}')
            async with f.client.post(f"{f.url}/x", data=packed, headers={"Content-Encoding": "br"}) as response:
                return response.status

        async with asyncio.timeout(10):
            async with raw_client(f.url) as client:
                client.send(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Encoding: br\r\nContent-Length: 10\r\n\r\nx")
                while await asked() != 429:
                    pass
            while await asked() != 200:
                pass


@pytest.mark.parametrize(
    "body",
    [b'{"model":"m","temperature":NaN}', b'\xef\xbb\xbf{"model":"m"}', b'{"model":"m","x":' + b"[" * 1200 + b"]" * 1200 + b"}"],
    ids=["NaN", "byte order mark", "deep"],
)
async def test_what_engines_take_is_theirs_to_decide(body: bytes) -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        async with f.client.post(f"{f.url}/x", data=body) as response:
            assert bytes.fromhex((await response.json())["body"]) == body


async def test_broken_json_is_told_with_its_place() -> None:
    async with front() as f:
        for media in ("application/json", "application/x-www-form-urlencoded"):
            async with f.client.post(f"{f.url}/x", data=b'{"model":"m",', headers={"Content-Type": media}) as response:
                error = (await response.json())["error"]
            assert (response.status, error["code"]) == (400, "bad_json")
            assert "line 1, column 14 (byte 13)" in error["message"]


async def test_a_body_that_is_packed_for_the_connection_is_not_taken() -> None:
    """Its coding would not be passed on, and the engine take it for what it is not."""
    async with Engine() as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        for coding in (b"gzip, chunked", b"gzip,Chunked"):
            client.get("/models/m/x", b"Transfer-Encoding: " + coding, method="POST")
            client.send(b"3\r\nabc\r\n0\r\n\r\n")
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (501, "unsupported_transfer_encoding")
        assert engine.seen.empty()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
