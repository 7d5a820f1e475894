"""Who answers at the port of a process that stands still: by the sockets that the process has, and nothing of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.engine.doorkeeper import Doorkeeper
from restore_agent.engine.engine import Engine
from restore_agent.engine.listening import listening_sockets
from restore_agent.places.processes import is_stopped
from restore_agent.snapshots.manifest import EngineRecord
from tests.worlds.exhausted import descriptors_left
from tests.worlds.ports import free_port
from tests.worlds.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="another's sockets are root's to take")
STREAMING = Path(__file__).parents[1] / "worlds/streaming_engine.py"


class Asleep:
    """A server that stands still, and the doorkeeper at its port."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.wakes = 0
        self.fails: Exception | None = None
        place: Any = SimpleNamespace(host_pids=lambda: {1: os.getpid(), 5: process.pid}, netns="")
        record = EngineRecord(command=("engine",), port=port, health_path="/health")
        self.engine = Engine(record, place, SimpleNamespace(), 5)  # type: ignore[arg-type]
        self.doorkeeper: Doorkeeper

    def falls_asleep(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        self.doorkeeper = Doorkeeper(self.engine, {"/ready?deep=1"}, self._wanted)

    async def _wanted(self) -> None:
        self.wakes += 1
        if self.fails:
            raise self.fails
        self.doorkeeper.stop()
        os.kill(self.process.pid, signal.SIGCONT)

    async def ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            async with asyncio.timeout(30):
                return await reader.read()
        finally:
            writer.close()


@pytest.fixture
async def asleep() -> AsyncIterator[Asleep]:
    port = free_port()
    with subprocess.Popen([sys.executable, str(STREAMING), str(port)], stdout=subprocess.DEVNULL) as process:
        world = Asleep(process, port)
        with contextlib.suppress(OSError):
            await until(lambda: listens(process.pid, port))
        world.falls_asleep()
        await until(lambda: is_stopped(process.pid))
        try:
            yield world
        finally:
            await world.doorkeeper.close()
            process.kill()


def listens(pid: int, port: int) -> bool:
    found = listening_sockets([pid], port)
    for each in found:
        each.close()
    return bool(found)


PROBES = {
    "health": b"GET /health HTTP/1.1\r\nHost: x\r\nUser-Agent: kube-probe/1.36\r\n\r\n",
    "the pod's own": b"GET /ready?deep=1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "head": b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("request_", PROBES.values(), ids=PROBES.keys())
async def test_probes_are_answered_and_wake_nobody(asleep: Asleep, request_: bytes) -> None:
    for _ in range(3):
        answer = await asleep.ask(request_)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
        assert answer.endswith(b"\r\n\r\n" if request_.startswith(b"HEAD") else b"\r\n\r\nasleep\n")
    assert (asleep.wakes, is_stopped(asleep.process.pid)) == (0, True)


async def test_a_probe_that_only_connects_wakes_nobody(asleep: Asleep) -> None:
    with socket.create_connection(("127.0.0.1", asleep.port)):
        """It has seen what it wanted."""
    assert await asleep.ask(PROBES["health"])
    assert asleep.wakes == 0


REQUESTS = {
    "another path": b"GET /slow?seconds=0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a probe's path, another query": b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "half of one": b"GET /he",
    "another method": b"PUT /health HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "no HTTP": b"\x16\x03\x01\x02\n",
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
async def test_whoever_wants_something_has_it_woken_and_gets_its_answer(
    asleep: Asleep, request_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restore_agent.engine.doorkeeper._HEAD_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", asleep.port)
    writer.write(request_)
    await until(lambda: asleep.wakes == 1)
    if request_.endswith(b"/he"):
        writer.write(b"alth HTTP/1.1\r\nConnection: close\r\n\r\n")
    async with asyncio.timeout(30):
        answer = await reader.read()
    writer.close()
    assert answer and b"asleep" not in answer, "the server's own answer, whatever it makes of it"
    assert not is_stopped(asleep.process.pid)


async def test_who_comes_when_it_is_awake_again_is_the_engine_s(asleep: Asleep) -> None:
    stream = asyncio.create_task(asleep.ask(b"GET /stream?n=20&every=0.05 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    await until(lambda: asleep.wakes == 1)
    assert b"asleep" not in await asleep.ask(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await stream).count(b"data: ") == 20, "what was accepted before is passed on to its end"
    assert asleep.wakes == 1


async def test_one_that_cannot_be_woken_is_said_to_be_so(asleep: Asleep) -> None:
    asleep.fails = RuntimeError("its GPU is full")
    answer = await asleep.ask(REQUESTS["another path"])
    assert answer.startswith(b"HTTP/1.1 503 ") and b"its GPU is full" in answer and b"Retry-After: 1" in answer
    assert (await asleep.ask(PROBES["health"])).startswith(b"HTTP/1.1 200 "), "it sleeps on, and is well"


async def test_one_that_falls_asleep_while_the_agent_has_no_descriptor_left_is_asked_a_little_later(
    asleep: Asleep, caplog: pytest.LogCaptureFixture
) -> None:
    asleep.doorkeeper.stop()
    with descriptors_left(0):
        asleep.falls_asleep()
        await asyncio.sleep(0.5)  # it tries again, and says nothing more
        assert caplog.text.count("is heard for a moment: [Errno 24]") == 1
    assert (await asleep.ask(PROBES["health"])).startswith(b"HTTP/1.1 200 ")
    assert asleep.wakes == 0


async def test_who_connects_while_the_agent_has_no_descriptor_left_waits(asleep: Asleep, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[socket.socket] = []
    accept = Doorkeeper._accept

    def counted(doorkeeper: Doorkeeper, listener: socket.socket) -> None:
        tries.append(listener)
        accept(doorkeeper, listener)

    asleep.doorkeeper.stop()
    monkeypatch.setattr(Doorkeeper, "_accept", counted)
    asleep.falls_asleep()
    with socket.socket() as client:
        client.setblocking(False)
        with descriptors_left(0):
            with contextlib.suppress(BlockingIOError):
                client.connect(("127.0.0.1", asleep.port))
            await asyncio.sleep(0.5)
            assert 1 <= len(tries) <= 4, "with a pause between them"
        await asyncio.get_running_loop().sock_sendall(client, PROBES["health"])
        async with asyncio.timeout(30):
            assert (await asyncio.get_running_loop().sock_recv(client, 100)).startswith(b"HTTP/1.1 200 ")


async def test_the_engine_s_sockets_are_as_they_were(asleep: Asleep) -> None:
    """They are shared: were they made not to block, its server would fail at a client that leaves."""
    (listener,) = listening_sockets([asleep.process.pid], asleep.port)
    assert os.get_blocking(listener.fileno())
    listener.close()
