"""WebSockets through the gateway: frames both ways, counted as in flight until their end, refused in the engine's own words."""

import asyncio
import socket

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from scaler.gateway.connection import Connection
from scaler.gateway.dispatcher import Backend, Endpoint
from scaler.gateway.upgrade import Frames
from tests.worlds.front import front
from tests.worlds.raw_client import raw_client
from tests.worlds.raw_engine import Asked, raw_engine, saying

ASK = (
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
AGREED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"


async def test_a_real_websocket_echoes_and_is_in_flight_until_it_ends() -> None:
    asked: list[str] = []

    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(request.raw_path)
        socket = web.WebSocketResponse(protocols=["realtime"], max_msg_size=0)
        await socket.prepare(request)
        async for message in socket:
            if message.data == "end":
                await socket.close(code=4000, message=b"as told")
            elif message.type is aiohttp.WSMsgType.TEXT:
                await socket.send_str(message.data)
            else:
                await socket.send_bytes(message.data)
        return socket

    runner = web.ServerRunner(web.Server(echo, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with front() as f, asyncio.timeout(10):
        f.dispatcher.add(Backend("r1", "m", Endpoint(*runner.addresses[0][:2])))
        for end in ("engine", "client"):
            async with f.client.ws_connect(f"{f.url}/models/m/v1/realtime?model=x", protocols=["realtime"], max_msg_size=0) as socket:
                assert socket.protocol == "realtime"
                assert f.ledger.demand("m").in_flight == 1
                for data in (b"\x00\xff", b"x" * 2**20, b"z" * 2**23):
                    await socket.send_bytes(data)
                    assert await socket.receive_bytes() == data
                await socket.send_str("é")
                assert await socket.receive_str() == "é"
                if end == "engine":
                    await socket.send_str("end")
                    assert (await socket.receive()).extra == "as told"
                    assert socket.close_code == 4000
            await f.until(lambda demand: demand.pending == 0)
    assert asked == ["/v1/realtime?model=x"] * 2
    await runner.cleanup()


async def test_the_handshake_and_what_comes_right_behind_it_go_through_unread() -> None:
    told: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(asked: Asked) -> None:
        asked.writer.write(AGREED + b"\x81\x02hi")
        while data := await asked.reader.read(2**16):
            told.put_nowait(data)

    async with raw_engine(serve) as engine, front() as f, raw_client(f.url) as client:
        client.get("/models/m/ws", *ASK)
        client.send(b"GET / HTTP/1.1\r\n\r\n")  # frames that look like anything, sent before the engine is there
        await f.held(1)
        f.dispatcher.add(engine.replica())
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert {b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Accept: x"} <= set(head.split(b"\r\n"))
        assert await client.exactly(4) == b"\x81\x02hi"
        got = b""
        async with asyncio.timeout(5):
            while got != b"GET / HTTP/1.1\r\n\r\n":
                got += await told.get()
        assert {b"Connection: Upgrade", b"Upgrade: websocket", *ASK[2:]} <= set(engine.heads[0].split(b"\r\n"))
        client.writer.transport.abort()
        async with asyncio.timeout(5):
            await f.until(lambda demand: demand.pending == 0)


@pytest.mark.parametrize(
    "refusal",
    [
        b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
    ],
)
async def test_an_engine_that_does_not_agree_is_heard_and_the_connection_goes_on(refusal: bytes) -> None:
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain"
    async with raw_engine(saying(refusal, plain)) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get("/models/m/ws", *ASK)
        head = await client.head()
        assert head.startswith(refusal[:12])
        assert (b"Upgrade: websocket" in head) == (b"426" in refusal)
        assert b"no" in await client.until(b"no\r\n0\r\n\r\n" if b"chunked" in refusal else b"no")
        client.get()
        await client.head()
        assert await client.exactly(5) == b"plain"


async def test_another_protocol_is_not_upgraded_to_and_the_request_is_answered() -> None:
    async with raw_engine(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get("/models/m/x", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
        assert (await client.head()).startswith(b"HTTP/1.1 200 OK")
        assert b"pgrade" not in engine.heads[0]
        assert b"HTTP2" not in engine.heads[0]


@pytest.mark.parametrize("way", ["engine closes", "engine resets", "removed"])
async def test_either_end_of_the_engine_ends_the_clients_side(way: str) -> None:
    asked: asyncio.Queue[Asked] = asyncio.Queue()

    async def serve(one: Asked) -> None:
        one.writer.write(AGREED)
        asked.put_nowait(one)
        await one.reader.read()

    async with raw_engine(serve) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get("/models/m/ws", *ASK)
        await client.head()
        one = await asked.get()
        if way == "engine closes":
            one.writer.close()
        elif way == "engine resets":
            one.reset()
        else:
            f.dispatcher.remove("r1")
        async with asyncio.timeout(1):
            assert await client.reader.read() == b""
            await f.until(lambda demand: demand.pending == 0)


@pytest.mark.parametrize("slow", ["engine", "client"])
async def test_a_slow_side_slows_the_other_down(slow: str) -> None:
    reading = asyncio.Event()
    written = 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        for _ in range(2**10):
            writer.write(b"x" * 2**16)
            await writer.drain()
            written += 2**16

    async def serve(one: Asked) -> None:
        one.writer.write(AGREED)
        if slow == "client":
            await flood(one.writer)
        else:
            await reading.wait()
        await one.reader.readexactly(2**26 if slow == "engine" else 1)
        one.writer.write(b"done")

    async with raw_engine(serve) as engine, front() as f, raw_client(f.url) as client:
        f.dispatcher.add(engine.replica())
        client.get("/models/m/ws", *ASK)
        await client.head()
        if slow == "client":
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            flooding = None
        else:
            flooding = asyncio.create_task(flood(client.writer))
        last = -1
        while written != last:
            last = written
            await asyncio.sleep(0.2)
        assert written < 2**25
        async with asyncio.timeout(20):
            if flooding is None:
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
                assert len(await client.reader.readexactly(2**26)) == 2**26
                client.send(b"x")
            else:
                reading.set()
                await flooding
            assert await client.reader.readexactly(4) == b"done"


async def test_frames_that_come_when_the_engine_has_just_ended_are_no_fault_of_the_gateways() -> None:
    """In the turn of the event loop before the client is told: aiohttp would log an error of the protocol's, with a traceback."""
    with socket.socket() as made:
        connection = Connection(made, lambda _: None)
        connection.end(ConnectionResetError("the engine was killed"))
        assert Frames(make_mocked_request("GET", "/"), connection).feed_data(b"x") == (False, b"")
