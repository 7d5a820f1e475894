"""Replicas that die, are drained, or live in another network namespace; and OpenAI's own client through a scale from zero."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import openai
import pytest

from scaler.gateway.dispatcher import Endpoint, Replica
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front
from tests.worlds.network_namespace import network_namespace


@dataclass
class Process:
    """An engine in a process of its own."""

    process: asyncio.subprocess.Process
    port: int

    def replica(self, name: str, netns: str = "") -> Replica:
        return Replica(name, "m", "node", Endpoint("127.0.0.1", self.port, netns), "restored")

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def process(*arguments: str, inside: tuple[str, ...] = ()) -> AsyncIterator[Process]:
    """Starts the test engine; `held`: its pieces wait for POST /release. inside: a command that runs it, as in a namespace."""
    command = [*inside, sys.executable, "-m", "tests.worlds.echo_engine", *arguments]
    started = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdout is not None
    try:
        async with asyncio.timeout(30):
            yield Process(started, int(await started.stdout.readline()))
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


@pytest.fixture
def namespace() -> Iterator[str]:
    with network_namespace() as name:
        yield name


async def test_a_request_is_retried_elsewhere_when_its_replica_is_killed() -> None:
    async with process("held") as dying, Engine() as living, front() as f:
        f.dispatcher.add(dying.replica("dying"))
        asked = [f.ask(f"n{i}", stream=bool(i % 2)) for i in range(8)]
        await f.until(lambda demand: demand.in_flight == 8)
        held = f.ask("held")
        await f.held(1)
        f.dispatcher.add(living.replica("living"))
        await dying.kill()
        answers = await asyncio.gather(*asked, held)
        assert [answer.status for answer in answers] == [200] * 9
        assert sorted(living.seen.get_nowait() for _ in answers) == ["held", *(f"n{i}" for i in range(8))]


async def test_held_requests_outlive_a_killed_replica() -> None:
    """The gateway learns of the death from a refused connection, long before any agent says so."""
    async with process() as dead, Engine() as living, front(concurrency=1) as f:
        await dead.kill()
        asked = []
        for i in range(5):
            asked.append(f.ask(f"n{i}"))
            await f.held(i + 1)
        f.dispatcher.add(dead.replica("dead"))
        assert f.ledger.demand("m").in_flight == 1
        await f.held(5)  # its place is given back; nobody else is sent there
        f.dispatcher.add(living.replica("living"))
        f.dispatcher.remove("dead")
        assert [answer.text for answer in await asyncio.gather(*asked)] == [f"n{i}" for i in range(5)]
        assert living.seen.get_nowait() == "n0"  # the retried one goes first


async def test_a_second_failure_is_told() -> None:
    async with process("held") as one, process("held") as two, front(concurrency=1) as f:
        f.dispatcher.add(one.replica("one"))
        asked = f.ask()
        await f.until(lambda demand: demand.in_flight == 1)
        f.dispatcher.add(two.replica("two"))
        await one.kill()
        await f.held(0)
        await f.until(lambda _: f.dispatcher.in_flight("two") == 1)
        await two.kill()
        answer = await asked
        assert (answer.status, answer.error["code"]) == (502, "replica_failed")
        assert f.ledger.demand("m").pending == 0


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
        if patient:
            error = (await response.content.read()).removeprefix(b"\n\ndata: ")
            assert json.loads(error)["error"]["code"] == "replica_failed"
        else:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()


async def test_a_streaming_body_is_not_sent_twice() -> None:
    async with Engine() as dying, Engine() as living, front() as f:
        f.dispatcher.add(dying.replica("dying"))

        async def upload() -> AsyncIterator[bytes]:
            yield b"part"
            await dying.seen.get()
            f.dispatcher.remove("dying")
            f.dispatcher.add(living.replica("living"))
            yield b"rest"

        async with f.client.post(f"{f.url}/models/m/x", data=upload()) as response:
            assert response.status == 502
            assert "cannot be sent again" in (await response.json())["error"]["message"]
        assert living.seen.empty()


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
        await reader.read(1)  # the next request on this connection
        writer.close()

    server = await asyncio.start_server(serve_once, "127.0.0.1", 0)
    async with server, front() as f:
        f.dispatcher.add(Replica("r1", "m", "node", Endpoint("127.0.0.1", server.sockets[0].getsockname()[1]), "cold"))
        for _ in range(3):
            async with asyncio.timeout(10):
                assert (await f.ask()).text == "once"
        assert served == 3


async def test_removing_a_replica_closes_its_connections() -> None:
    async with Engine(held=True) as old, Engine() as new, front() as f:
        f.dispatcher.add(old.replica("old"))
        asked = f.ask("x")
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
def mute(*, connects: bool) -> Iterator[Replica]:
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
        yield Replica("mute", "m", "node", Endpoint(*listening.getsockname()), "restored")


@pytest.mark.parametrize("size", [10, 2**24], ids=["a small body", "a body that nobody reads"])
@pytest.mark.parametrize("connects", [False, True], ids=["connecting", "connected"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 6, 8, 100])
async def test_a_request_on_a_replica_that_is_removed_goes_on_at_once(turns: int, connects: bool, size: int) -> None:
    """At whatever stage before its first byte the request is: `turns` of the loop after its place was handed out, or at rest."""
    async with Engine() as living, front(2**25) as f:
        with mute(connects=connects) as replica:
            asked = f.ask("x" * size)
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


async def test_draining_a_replica() -> None:
    async with Engine(held=True) as old, Engine() as new, front() as f:
        f.dispatcher.add(old.replica("old"))
        asked = f.ask("x")
        await old.seen.get()
        draining = asyncio.create_task(f.dispatcher.drain("old"))
        await f.until(lambda demand: demand.replicas == 1 and not f.dispatcher.ready("m"))
        later = f.ask("later")
        await f.held(1)
        f.dispatcher.add(new.replica("new"))
        assert (await later).text == "later"
        assert not draining.done()
        old.say()
        assert (await asked).text == "x"
        await draining
        f.dispatcher.remove("old")
        await f.dispatcher.drain("old")  # gone: nothing to wait for
        assert [replica.id for replica in f.dispatcher.ready("m")] == ["new"]


async def test_the_same_replica_again_changes_nothing() -> None:
    async with Engine(held=True) as engine, Engine() as other, front() as f:
        f.dispatcher.add(engine.replica("r1"))
        asked = f.ask("x")
        await engine.seen.get()
        f.dispatcher.add(engine.replica("r1"))
        assert f.dispatcher.in_flight("r1") == 1
        f.dispatcher.add(other.replica("r1"))  # another engine under the same name: the first one is gone
        assert (await asked).text == "x"
        assert other.seen.get_nowait() == "x"


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


@asynccontextmanager
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as made:
        yield made


async def test_openais_client_through_a_scale_from_zero() -> None:
    message = [{"role": "user", "content": "one two three"}]
    async with Engine() as engine, front() as f, client(f.url) as api:
        assert [model.id async for model in api.models.list()] == ["m"]
        plain = asyncio.create_task(api.chat.completions.create(model="m", messages=message))  # type: ignore[call-overload]
        stream = asyncio.create_task(api.chat.completions.create(model="m", messages=message, stream=True))  # type: ignore[call-overload]
        await f.held(2)
        f.dispatcher.add(engine.replica())
        assert (await plain).choices[0].message.content == "one two three"
        assert [piece.choices[0].delta.content async for piece in await stream] == ["one", "two", "three"]
        with pytest.raises(openai.NotFoundError, match="known models: m"):
            await api.chat.completions.create(model="nope", messages=message)  # type: ignore[call-overload]
        f.dispatcher.remove("r1")
        f.ledger.declare("m", type(f.ledger.limits("m"))(max_wait_seconds=0.05))
        with pytest.raises(openai.InternalServerError, match="no replica of model 'm' was free"):
            await api.chat.completions.create(model="m", messages=message)  # type: ignore[call-overload]


async def test_openais_client_cancelled_half_way() -> None:
    message = [{"role": "user", "content": "one two three"}]
    async with Engine(held=True) as engine, front() as f, client(f.url) as api:
        f.dispatcher.add(engine.replica())
        engine.say()
        async with asyncio.timeout(10):
            stream = await api.chat.completions.create(model="m", messages=message, stream=True)  # type: ignore[call-overload]
            async for piece in stream:
                assert piece.choices[0].delta.content == "one"
                break
            await stream.close()
            assert await engine.left.get() == "one two three"
        await f.until(lambda demand: demand.pending == 0)
