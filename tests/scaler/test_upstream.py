"""Connections to a replica: made in its network namespace, closed under requests, and lost while they are idle."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import pytest

from scaler.gateway import upstream as module
from scaler.gateway.dispatcher import Backend, Endpoint
from scaler.gateway.upstream import Upstream
from tests.worlds.echo_engine import Engine
from tests.worlds.engine_process import process
from tests.worlds.exhausted import descriptors_left
from tests.worlds.front import front
from tests.worlds.network_namespace import network_namespace
from tests.worlds.raw_engine import Asked, raw_engine, saying


@pytest.fixture
def namespace() -> Iterator[str]:
    with network_namespace() as name:
        yield name


async def test_an_idle_connection_closed_by_the_engine_costs_no_answer() -> None:
    """What every engine with a short keep-alive does: it closes just when the next request is on its way."""
    served = 0

    async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while not (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST") or not await reader.readuntil(b"}]}"):
            pass
        served += 1
        body = b'{"choices": [{"message": {"content": "once"}}]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()  # the next request on this connection meets it

    server = await asyncio.start_server(serve_once, "127.0.0.1", 0)
    async with server, front() as f:
        f.dispatcher.add(Backend("r1", "m", Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])))
        for _ in range(3):
            async with asyncio.timeout(10):
                assert (await f.ask()).text == "once"
        assert served == 3


async def test_removing_a_replica_closes_its_connections() -> None:
    async with Engine(held=True) as old, Engine() as new, front() as f:
        f.dispatcher.add(old.replica("old"))
        asked = f.ask("x", Idempotency_Key="it may be sent twice")
        await old.seen.get()
        f.dispatcher.remove("old")
        f.dispatcher.remove("old")  # again changes nothing
        async with asyncio.timeout(10):
            assert await old.left.get() == "x"
        await f.held(1)
        assert f.ledger.demand("m").replicas == 0
        f.dispatcher.add(new.replica("new"))
        assert (await asked).text == "x"


@contextmanager
def mute(*, connects: bool) -> Iterator[Backend]:
    """A listening socket from which nobody takes anything: connections are made but not read, or, its backlog being full, not even made."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(16 if connects else 0)
        while not connects:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect(listening.getsockname())
            except TimeoutError:
                break
        yield Backend("mute", "m", Endpoint(*listening.getsockname()))


@pytest.mark.parametrize("size", [10, 2**24], ids=["a small body", "a body that nobody reads"])
@pytest.mark.parametrize("connects", [False, True], ids=["connecting", "connected"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 6, 8, 100])
async def test_a_request_on_a_replica_that_is_removed_goes_on_at_once(turns: int, connects: bool, size: int) -> None:
    """At whatever stage before its first byte the request is: `turns` of the loop after its place was handed out, or at rest."""
    async with Engine() as living, front(2**25) as f:
        with mute(connects=connects) as replica:
            asked = f.ask("x" * size, Idempotency_Key="it may be sent twice")
            await f.held(1)
            f.dispatcher.add(replica)
            for _ in range(turns):
                await asyncio.sleep(0.002 if turns == 100 else 0)
            assert f.ledger.demand("m").in_flight == 1
            f.dispatcher.remove("mute")
            async with asyncio.timeout(2):  # less than any of the timeouts on a connection
                await f.held(1)
                f.dispatcher.add(living.replica("living"))
                assert (await asked).text == "x" * size
                await f.dispatcher.close()


async def test_an_engine_in_another_network_namespace(namespace: str) -> None:
    path = f"/run/netns/{namespace}"
    ours = Path("/proc/thread-self/ns/net").readlink()
    async with process(inside=("ip", "netns", "exec", namespace)) as engine, front() as f:
        with pytest.raises(aiohttp.ClientConnectorError):  # nothing listens there outside
            await f.client.get(f"http://127.0.0.1:{engine.port}/")
        f.dispatcher.add(engine.replica("r1", path))
        answers = await asyncio.gather(*(f.ask(f"n{i}") for i in range(20)))
        assert [answer.text for answer in answers] == [f"n{i}" for i in range(20)]
        assert Path("/proc/thread-self/ns/net").readlink() == ours


async def test_a_namespace_that_is_gone_costs_a_retry() -> None:
    async with Engine() as living, front() as f:
        f.dispatcher.add(living.replica("dead", netns="/run/netns/is-not-there"))
        asked = f.ask()
        await f.held(1)
        f.dispatcher.add(living.replica("living"))
        assert (await asked).text == "hello"


async def test_a_replica_that_came_while_there_was_no_descriptor_left_serves_once_there_is(namespace: str) -> None:
    """Its namespace could not be held open, and nothing is wrong with the replica."""
    async with process(inside=("ip", "netns", "exec", namespace)) as engine, front() as f:
        with descriptors_left(0):
            f.dispatcher.add(engine.replica("r1", f"/run/netns/{namespace}"))
        assert (await f.ask()).text == "hello"


async def test_one_that_is_removed_in_the_moment_in_which_a_connect_has_taken_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds goes all the same."""
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.05)
    with mute(connects=False) as replica:
        upstream = Upstream(Endpoint(replica.endpoint.host, replica.endpoint.port, "/proc/self/ns/net"))
        probe, removed = asyncio.ensure_future(upstream.probe()), asyncio.Event()

        def remove() -> None:
            with contextlib.suppress(StopIteration):  # it waits for nothing
                upstream.close().send(None)
            removed.set()

        await asyncio.sleep(0)
        (scope,) = upstream._connecting
        asyncio.get_running_loop().call_at(scope.when() or 0.0, remove)  # after the scope's own call, and before its task has heard
        with pytest.raises((TimeoutError, ConnectionAbortedError)):
            await probe
        assert removed.is_set() and upstream._namespace is None


async def test_connections_go_before_an_engine_closes_them_which_it_shows_once() -> None:
    """Engines close idle connections after times of their own, and a request that meets that may be lost."""
    closed: list[int] = []

    def close(asked: Asked) -> None:
        if not asked.writer.is_closing():
            closed.append(asked.number)
            asked.writer.close()

    async def serve(asked: Asked) -> None:
        asked.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        asyncio.get_running_loop().call_later(0.2, close, asked)

    async with raw_engine(serve) as engine, asyncio.timeout(20):
        upstream = Upstream(Endpoint("127.0.0.1", engine.port))
        for _ in range(3):
            upstream.give_back(await upstream.send(b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
            await engine.ended.get()
        assert closed == [1]
        assert engine.connections == 3
        await upstream.close()


async def test_idle_connections_end_when_they_are_needed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.gateway.upstream._IDLE_SECONDS", 0.05)
    request = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"
    async with raw_engine(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as engine, asyncio.timeout(5):
        upstream = Upstream(Endpoint("127.0.0.1", engine.port))
        both = [await upstream.send(b"GET", request), await upstream.send(b"GET", request)]
        for connection in both:
            upstream.give_back(connection)
        for _ in both:
            await engine.ended.get()  # after a while
        last = await upstream.send(b"GET", request)
        assert engine.connections == 3
        upstream.give_back(last)
        upstream.close_idle()
        await engine.ended.get()
        await upstream.close()


async def test_an_engine_that_closes_whatever_it_accepts_has_not_got_the_request() -> None:
    """As a port forwarder without anybody behind it does: the request goes elsewhere, whatever it is, and nobody goes round in circles."""
    accepted = 0

    def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    async with server, Engine() as living, front() as f, asyncio.timeout(20):
        for turn in range(10):
            f.dispatcher.add(Backend(f"mute{turn}", "m", Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])))
            asked = f.ask("x")
            await f.held(1)
            f.dispatcher.add(living.replica("living"))
            assert (await asked).text == "x"
            f.dispatcher.remove("living")
            f.dispatcher.remove(f"mute{turn}")
        assert accepted < 60  # with the looks whether it is back
