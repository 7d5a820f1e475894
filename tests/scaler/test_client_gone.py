"""Clients that go while nobody reads from them, and clients that have only said all."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from scaler.gateway import client_gone
from scaler.gateway.client_gone import ClientWatch
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front


class Connection(asyncio.Protocol):
    """A server's side of a connection. writes: whether it can ask its client."""

    def __init__(self, watch: ClientWatch, writes: bool = True) -> None:
        self.lost = asyncio.Event()
        self.probes = 0
        self.writes = writes
        self.written: int | None = 0
        self.transport: asyncio.Transport | None = None
        self.watch = watch

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.lost(self)
        self.lost.set()

    def eof_received(self) -> bool:
        self.watch.suspect(self)
        return True

    def probe(self) -> bool:
        assert self.transport is not None
        if self.writes:
            self.probes += 1
            self.transport.write(b"?")
        return self.writes


@pytest.fixture
async def watch(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ClientWatch]:
    monkeypatch.setattr(client_gone, "GRACE_SECONDS", 0.02)
    made = ClientWatch()
    yield made
    made.close()


@asynccontextmanager
async def connected(
    watch: ClientWatch, *, unread: bool = False, writes: bool = True, kind: type[Connection] = Connection
) -> AsyncIterator[tuple[socket.socket, Connection]]:
    """A client's socket, and the other side of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    transport, connection = await asyncio.get_running_loop().create_connection(lambda: kind(watch, writes), sock=accepted)
    connection.transport = transport
    if unread:
        transport.pause_reading()  # not before it is made: some Pythons begin to read after that all the same
    with client:
        yield client, connection
    transport.abort()


def gone(client: socket.socket, how: str) -> None:
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "shut down":
        client.shutdown(socket.SHUT_RDWR)
    client.close()


@pytest.mark.parametrize("unread", [False, True], ids=["read", "unread"])
@pytest.mark.parametrize("how", ["closed", "shut down", "reset"])
async def test_a_client_that_has_left_is_noticed(watch: ClientWatch, how: str, unread: bool) -> None:
    async with connected(watch, unread=unread) as (client, connection), connected(watch, unread=unread) as (_, stays):
        with watch.unread(connection), watch.unread(stays):
            client.send(b"something unread" if unread else b"x")
            gone(client, how)
            async with asyncio.timeout(10):
                await connection.lost.wait()
            assert not stays.lost.is_set()
            assert not stays.probes


@pytest.mark.parametrize("unread", [False, True], ids=["read", "unread"])
async def test_a_client_that_has_said_all_is_asked_and_stays(watch: ClientWatch, unread: bool) -> None:
    async with connected(watch, unread=unread) as (client, connection):
        with watch.unread(connection):
            client.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(10):
                while connection.probes < 3:
                    await asyncio.sleep(0.01)
            assert not connection.lost.is_set()
            client.close()
            async with asyncio.timeout(10):
                await connection.lost.wait()


class Writes(Connection):
    """One whose answer has gone on whenever it is looked at."""

    looks = 0
    goes_on = True

    @property  # type: ignore[override]
    def written(self) -> int:
        self.looks += self.goes_on
        return self.looks

    @written.setter
    def written(self, _: int | None) -> None:
        """It is counted here."""


async def test_an_answer_that_is_written_asks_by_itself(watch: ClientWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_gone, "_LAST_PROBE_SECONDS", 0.02)
    async with connected(watch, kind=Writes, writes=False) as (client, connection):
        assert isinstance(connection, Writes)
        client.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            while connection.looks < 10:
                await asyncio.sleep(0.01)
            assert not connection.lost.is_set()
            connection.goes_on = False  # it stands still, and the client cannot be asked
            await connection.lost.wait()


async def test_a_connection_that_owes_nothing_is_left_alone(watch: ClientWatch) -> None:
    async with connected(watch, writes=False) as (client, connection), connected(watch, writes=False) as (other, noticed):
        connection.written = None
        client.shutdown(socket.SHUT_WR)
        other.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            await noticed.lost.wait()
        assert not connection.lost.is_set()


async def test_a_client_that_goes_after_the_block_is_somebody_elses_to_notice(watch: ClientWatch) -> None:
    async with connected(watch, unread=True) as (client, connection), connected(watch, unread=True) as (second, noticed):
        with watch.unread(connection):
            pass
        gone(client, "reset")
        with watch.unread(noticed):  # by when this one has been noticed, the first one would have been
            gone(second, "reset")
            async with asyncio.timeout(10):
                await noticed.lost.wait()
        assert not connection.lost.is_set()


async def test_a_client_that_leaves_with_its_body_unread_is_noticed() -> None:
    """Its connection is full, so nobody reads from it while it is held: only the kernel knows that it has gone."""
    async with Engine() as engine, front() as f:
        host, port = f.url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, b"POST /models/m/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
            await f.held(1)
            with pytest.raises(BlockingIOError):  # until nobody takes any more
                while True:
                    client.send(b"x" * 2**20)
                    await asyncio.sleep(0)  # the gateway's turn
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets the connection
        await f.held(0)
        f.dispatcher.add(engine.replica())
        assert (await f.ask()).status == 200
        assert engine.seen.get_nowait() == "hello"
