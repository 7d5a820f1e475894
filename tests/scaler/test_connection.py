"""One connection to an engine: whoever waits on it hears of its end, in whatever way it ends, and nobody fills memory for another."""

import asyncio
import os
import select
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest

from scaler.gateway.answer_parser import BadAnswer
from scaler.gateway.connection import Connection
from scaler.gateway.dispatcher import Endpoint
from scaler.gateway.upstream import Upstream
from tests.chaos.wires import EngineWire
from tests.worlds.network_namespace import network_namespace
from tests.worlds.raw_engine import Asked, RawEngine, raw_engine, saying
from tests.worlds.waiting import until
from zerowake_shared.network_namespace import NetworkNamespace

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"


class Collected:
    """Takes a body, and is full when the test says so."""

    def __init__(self) -> None:
        self.text = b""
        self.full = False
        self.room = asyncio.Event()
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self.was_cut = False

    def take(self, piece: bytes) -> bool:
        self.text += piece
        self.pieces.put_nowait(piece)
        return not self.full

    async def emptied(self) -> None:
        await self.room.wait()

    def cut(self) -> None:
        self.was_cut = True
        self.room.set()


def upstream(engine: RawEngine) -> Upstream:
    return Upstream(Endpoint("127.0.0.1", engine.port))


REQUEST = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"
UPLOAD = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


async def ask(client: Upstream, request: bytes = REQUEST, body: AsyncIterator[bytes] | None = None) -> Connection:
    async with asyncio.timeout(5):
        return await client.send(request.partition(b" ")[0], request, body, repeatable=body is None)


ENDS = {
    "the engine closes": lambda asked, client: asked.writer.close(),
    "the engine resets": lambda asked, client: asked.reset(),
    "nonsense": lambda asked, client: asked.writer.write(b"zz\r\n" * 100),
    "we close": lambda asked, client: asyncio.ensure_future(client.close()),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_whoever_waits_for_the_rest_hears_of_the_end(end, turns: int) -> None:  # type: ignore[no-untyped-def]
    asked: asyncio.Queue[Asked] = asyncio.Queue()

    async def serve(one: Asked) -> None:
        one.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhell\r\n")
        asked.put_nowait(one)
        await one.reader.read()

    async with raw_engine(serve) as engine, asyncio.timeout(5):
        client = upstream(engine)
        connection = await ask(client)
        one = await asked.get()
        receiver = Collected()
        waiting = asyncio.create_task(connection.pass_on(receiver))
        for _ in range(turns):
            await asyncio.sleep(0)
        end(one, client)
        with pytest.raises((OSError, BadAnswer)):
            await waiting
        assert receiver.text == b"hell"
        await client.close()


@pytest.mark.parametrize("end", [end for name, end in ENDS.items()], ids=ENDS)
async def test_whoever_waits_for_the_first_byte_hears_of_the_end(end) -> None:  # type: ignore[no-untyped-def]
    asked: asyncio.Queue[Asked] = asyncio.Queue()

    async def serve(one: Asked) -> None:
        one.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        asked.put_nowait(one)
        await one.reader.read()

    async with raw_engine(serve) as engine, asyncio.timeout(5):
        client = upstream(engine)
        waiting = asyncio.create_task(client.send(b"GET", REQUEST))
        end(await asked.get(), client)
        with pytest.raises((OSError, BadAnswer)):
            await waiting
        await client.close()


async def test_a_receiver_that_is_full_stops_the_engine_and_is_told_of_the_end_too() -> None:
    written = 0
    stopped = asyncio.Event()

    async def serve(one: Asked) -> None:
        nonlocal written
        one.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        one.writer.transport.set_write_buffer_limits(0)
        try:
            while True:
                one.writer.write(b"x" * 2**16)
                written += 2**16
                try:
                    async with asyncio.timeout(0.3):
                        await one.writer.drain()
                except TimeoutError:
                    stopped.set()
                    await one.writer.drain()
        finally:
            stopped.set()

    async with raw_engine(serve) as engine, asyncio.timeout(10):
        client = upstream(engine)
        receiver = Collected()
        receiver.full = True
        waiting = asyncio.create_task((await ask(client)).pass_on(receiver))
        await stopped.wait()
        assert len(receiver.text) < 2**22
        assert written < 2**24  # what both kernels hold
        assert not waiting.done()
        receiver.full = False
        receiver.room.set()
        while len(receiver.text) < 2**24:
            await receiver.pieces.get()
        receiver.room.clear()
        receiver.full = True
        before = receiver.pieces.qsize()
        while receiver.pieces.qsize() == before:
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(ConnectionAbortedError):
            await waiting
        assert receiver.was_cut


async def test_an_engine_that_does_not_read_stops_the_upload() -> None:
    taken = 0
    reading = asyncio.Event()

    async def serve(one: Asked) -> None:
        await reading.wait()
        await one.reader.readexactly(one.length)
        one.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def upload() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(2**10):
            taken += 1
            yield b"x" * 2**16

    async with raw_engine(serve) as engine, asyncio.timeout(10):
        client = upstream(engine)
        waiting = asyncio.create_task(client.send(b"POST", UPLOAD % 2**26, upload(), repeatable=False))
        last = -1
        while taken != last:
            last = taken
            await asyncio.sleep(0.2)
        assert taken < 2**9
        reading.set()
        assert (await waiting).head.status == 200
        assert taken == 2**10
        await client.close()


@pytest.mark.parametrize("reset", [False, True])
async def test_an_answer_before_the_end_of_the_upload(reset: bool) -> None:
    """The engine says why it reads no further, and closes on what it has not read: a reset follows its answer."""
    answer = b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 9\r\n\r\ntoo large"

    async def serve(one: Asked) -> None:
        one.writer.write(answer)
        await one.writer.drain()
        if reset:
            one.writer.close()  # with the upload unread

    sent = 0

    async def upload() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 2**16
            await asyncio.sleep(0)

    async with raw_engine(serve) as engine:
        for _ in range(20):
            client = upstream(engine)
            connection = await ask(client, UPLOAD % 2**30, upload())
            assert connection.head.status == 413
            receiver = Collected()
            async with asyncio.timeout(5):
                await connection.pass_on(receiver)
                await connection.stop_upload()
            assert receiver.text == b"too large"
            before = sent
            client.give_back(connection)
            for _ in range(3):
                await asyncio.sleep(0)
            assert sent == before  # nothing more is taken from the client
            await client.close()


async def test_what_an_upload_raises_is_what_is_told() -> None:
    async def upload() -> AsyncIterator[bytes]:
        yield b"x"
        raise ValueError("the client's body is broken")

    async with raw_engine(saying(HEAD)) as engine:
        client = upstream(engine)
        with pytest.raises(ValueError, match="broken"):
            await client.send(b"POST", UPLOAD % 5, upload(), repeatable=False)
        await client.close()


@pytest.mark.parametrize(
    ("said", "usable"),
    [(b"", True), (b"HTTP/1.1 408 Request Timeout\r\n\r\n", False), (b"x", False), (None, False)],
)
async def test_an_idle_connection_is_looked_at(said: bytes | None, usable: bool) -> None:
    """Before the event loop has read what is there."""
    asked: asyncio.Queue[Asked] = asyncio.Queue()

    async def serve(one: Asked) -> None:
        one.writer.write(HEAD + b"0123456789")
        asked.put_nowait(one)

    async with raw_engine(serve) as engine, asyncio.timeout(5):
        client = upstream(engine)
        connection = await ask(client)
        assert connection.whole() == b"0123456789"
        assert connection.usable
        made = (await asked.get()).writer
        if said:
            made.write(said)  # at once, in this turn
        elif said is None:
            with socket.socket(fileno=os.dup(made.get_extra_info("socket").fileno())) as end:
                end.shutdown(socket.SHUT_WR)
        assert connection.usable is usable
        await client.close()


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize(
    ("how", "untouched"),
    [("closed before", True), ("took it and closed", False), ("took a part and was killed", False), ("took nothing", None)],
)
@pytest.mark.parametrize("again", [False, True], ids=["new", "kept alive"])
async def test_a_request_that_an_engine_took_and_died_of_is_told_from_one_that_never_came(
    how: str, untouched: bool | None, size: int, again: bool
) -> None:
    """An engine closes a connection, and no byte of an answer comes: what counts is whether it has read the request."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        made = socket.socket()
        made.setblocking(False)
        await loop.sock_connect(made, server.getsockname())
        engine, _ = server.accept()
        _, connection = await loop.create_connection(lambda: Connection(made, lambda _: None), sock=made)
        engine.setblocking(False)
        if again:
            first = asyncio.create_task(connection.ask(b"GET", b"GET / HTTP/1.1\r\n\r\n"))
            await loop.sock_recv(engine, 2**16)
            await loop.sock_sendall(engine, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await first
        request = b"POST / HTTP/1.1\r\n\r\n" + b"x" * size
        if how == "closed before":
            engine.close()
        asked = asyncio.create_task(connection.ask(b"POST", request))
        if how == "took it and closed":
            left = len(request)
            while left:
                left -= len(await loop.sock_recv(engine, 2**20))
        elif how == "took a part and was killed":
            await loop.sock_recv(engine, min(size, 4096))
        elif how == "took nothing":
            while not engine.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) if select.select([engine], [], [], 0)[0] else True:
                await asyncio.sleep(0)
        engine.close()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(5):
                await asked
        if how == "took a part and was killed" and size == 10:
            return  # every engine's first read takes that much
        assert connection.untouched is (size == 10 if untouched is None else untouched)


PORT = 8000
ENDED_BY_THE_NETWORK: dict[str, Callable[[EngineWire], bool]] = {
    "our end is gone": EngineWire.cut,
    "nothing is acknowledged any more": EngineWire.silence,
    "the engine's machine has forgotten it": EngineWire.half_open,
    "what was sent was sent once more": EngineWire.silence,
}


@pytest.mark.parametrize("how", ENDED_BY_THE_NETWORK)
async def test_a_request_that_an_engine_has_read_before_the_network_ended_the_connection(how: str) -> None:
    """However small it is, it may have been executed."""
    loop, once_more = asyncio.get_running_loop(), how == "what was sent was sent once more"
    with (
        network_namespace() as name,
        NetworkNamespace(f"/run/netns/{name}") as inside,
        inside.socket(socket.AF_INET, socket.SOCK_STREAM) as server,
    ):
        server.bind(("127.0.0.1", PORT))
        server.listen()
        made = inside.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 if how.startswith("nothing") else 30_000)
        await loop.sock_connect(made, server.getsockname())
        engine, _ = server.accept()
        engine.setblocking(False)
        wire = EngineWire(f"/run/netns/{name}", PORT)
        _, connection = await loop.create_connection(lambda: Connection(made, lambda _: None), sock=made)
        with engine:
            if once_more:
                wire.silence()
            asked = asyncio.create_task(connection.ask(b"POST", b"POST / HTTP/1.1\r\n\r\n"))
            if once_more:
                await until(lambda: made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:104] != bytes(4), "it is sent once more")
                wire.heal()
            assert await loop.sock_recv(engine, 2**16)
            if once_more:
                engine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                engine.close()
            else:
                assert ENDED_BY_THE_NETWORK[how](wire)
                if how.startswith("the engine's machine"):
                    wire.heal()
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(20):
                    await asked
        wire.close()
    assert not connection.untouched
