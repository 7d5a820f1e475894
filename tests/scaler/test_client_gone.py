"""Clients that go while nobody reads from them."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from scaler.gateway.client_gone import ClientWatch
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front


class Connection(asyncio.Protocol):
    """A server's side of a connection that it does not read from."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


@asynccontextmanager
async def unread() -> AsyncIterator[tuple[socket.socket, asyncio.Transport, Connection]]:
    """A client's socket, and the other side of it."""
    client, server = socket.socketpair()
    transport, connection = await asyncio.get_running_loop().create_connection(Connection, sock=server)
    transport.pause_reading()  # not before it is made: some Pythons begin to read after that all the same
    with client:
        yield client, transport, connection
    transport.abort()


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR, None], ids=["half closed", "shut down", "closed"])
async def test_an_unread_connection_ends_when_its_client_has_gone(how: int | None) -> None:
    watch = ClientWatch()
    async with unread() as (client, transport, connection), unread() as (_, other, stays):
        with watch.abort_if_gone(transport), watch.abort_if_gone(other):
            client.send(b"unread")
            client.close() if how is None else client.shutdown(how)
            async with asyncio.timeout(10):
                await connection.lost.wait()
            assert not stays.lost.is_set()
    watch.close()


async def test_a_client_that_goes_after_the_block_is_somebody_elses_to_notice() -> None:
    watch = ClientWatch()
    async with unread() as (client, transport, connection), unread() as (second, other, noticed):
        with watch.abort_if_gone(transport):
            pass
        client.close()
        with watch.abort_if_gone(other):  # by when this one has been noticed, the first one would have been
            second.close()
            async with asyncio.timeout(10):
                await noticed.lost.wait()
        assert not connection.lost.is_set()
    watch.close()


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
