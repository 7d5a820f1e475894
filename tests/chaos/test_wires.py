"""Connections that are spoiled, and those that are made anew once they are healed: of an engine in its own network, and of an agent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.proxy import Proxy
from tests.chaos.wires import EngineWire, between
from tests.worlds.network_namespace import network_namespace
from tests.worlds.waiting import until
from zerowake_shared.network_namespace import NetworkNamespace

PORT = 8000


@pytest.fixture
def network() -> Iterator[str]:
    with network_namespace() as name:
        yield f"/run/netns/{name}"


@contextlib.contextmanager
def engine(network: str) -> Iterator[socket.socket]:
    """A connection to a server that says everything after whoever asks."""
    with NetworkNamespace(network) as inside, inside.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", PORT))
        server.listen()
        with inside.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
            made.connect(server.getsockname())
            theirs, _ = server.accept()

            def echo() -> None:
                with contextlib.suppress(OSError), theirs:
                    while data := theirs.recv(1):
                        theirs.sendall(data)

            thread = threading.Thread(target=echo)
            thread.start()
            yield made
        thread.join()


def answered(connection: socket.socket, patience: float = 10) -> str:
    """What becomes of a byte: that it comes back, "nothing" for a while, or the error."""
    connection.settimeout(patience)
    try:
        connection.sendall(b"x")
        return connection.recv(1).decode()
    except TimeoutError:
        return "nothing"
    except OSError as error:
        return type(error).__name__


ENGINE: dict[str, tuple[Callable[[EngineWire], bool], str, str]] = {
    "cut": (EngineWire.cut, "ConnectionAbortedError", "BrokenPipeError"),
    "silent": (EngineWire.silence, "nothing", "x"),
    "half-open": (EngineWire.half_open, "nothing", "ConnectionResetError"),
    "refuses": (EngineWire.refuse, "ConnectionAbortedError", "BrokenPipeError"),
    "slow": (EngineWire.slow, "x", "x"),
}


@pytest.mark.parametrize("what", ENGINE)
def test_the_connection_to_an_engine(network: str, what: str) -> None:
    """While it is spoiled, and then: one that is silent goes on as TCP sends again."""
    spoil, meanwhile, then = ENGINE[what]
    wire = EngineWire(network, PORT)
    with engine(network) as connection:
        assert answered(connection) == "x"
        assert spoil(wire)
        assert answered(connection, 0.3 if meanwhile == "nothing" else 10) == meanwhile
        wire.heal()
        connection.settimeout(10)
        try:
            after = connection.recv(1).decode() if meanwhile == "nothing" else answered(connection)
        except OSError as error:
            after = type(error).__name__
        assert after == then
    with engine(network) as connection:
        assert answered(connection) == "x"
    wire.close()


def test_there_is_no_engine() -> None:
    with pytest.raises(OSError, match="No such file"):
        EngineWire("/proc/0/ns/net", PORT)


@pytest.fixture
def folder() -> Iterator[Path]:
    """For sockets, whose paths have 107 bytes at most."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


async def test_an_agent_has_the_proxy_in_its_place_and_so_has_its_successor(folder: Path) -> None:
    path, proxy = folder / "agent.sock", Proxy(0)

    async def ask() -> bytes:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            return await reader.read(1)
        finally:
            writer.close()

    async with between(path, proxy):
        for name in (b"1", b"2"):

            async def say(_: asyncio.StreamReader, writer: asyncio.StreamWriter, name: bytes = name) -> None:
                writer.write(name)

            path.unlink(missing_ok=True)  # as an agent does
            agent = await asyncio.start_unix_server(say, path)
            await until(lambda: path.exists() and path.samefile(folder / "wire.sock"), "the proxy is in its place")
            assert await ask() == name
            reader, writer = await asyncio.open_unix_connection(path)
            assert await reader.read(1) == name
            assert proxy.cut()
            assert await reader.read(1) == b""
            writer.close()
            agent.close()


@pytest.mark.parametrize("first", ["who asks", "who answers"])
async def test_an_end_is_told_to_the_other_side(folder: Path, first: str) -> None:
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait((reader, writer))

    server, proxy = await asyncio.start_unix_server(accept, folder / "server.sock"), Proxy(folder / "server.sock")
    async with proxy.laid(folder / "proxy.sock"), asyncio.timeout(10):
        ends = {"who asks": await asyncio.open_unix_connection(folder / "proxy.sock"), "who answers": await accepted.get()}
        _, writer = ends.pop(first)
        writer.close()
        ((reader, other),) = ends.values()
        assert await reader.read() == b""
        other.close()
    server.close()
