"""Placeholders that call: pid 1 of containers that runc made, and callers who say what no placeholder says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.places.container import Container
from restore_agent.places.container_error import ContainerError
from restore_agent.places.placeholder import SOCKET, Placeholder, PlaceholderError
from tests.worlds.agent import PORT
from tests.worlds.containers import Callers, Running, container
from tests.worlds.image import PYTHON
from tests.worlds.waiting import until
from zerowake_shared.network_namespace import NetworkNamespace

ENGINE = Path(__file__).parents[1] / "worlds/streaming_engine.py"
pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")


async def test_cold_it_becomes_its_own_command(callers: Callers, tmp_path: Path) -> None:
    own = ["sh", "-c", 'echo "I am $$ with [$SNAPSHOT_CONTROL_DIR] [$EXTRA]"; exit 7']
    async with container(tmp_path / "two", callers.folder, own) as two:
        placeholder = await callers.next()
        assert list(placeholder.command) == own
        placeholder.become()
        assert await two.exit_code() == 7
        assert two.log().endswith("I am 1 with [] []\n")
        await asyncio.wait_for(placeholder.ended, 10)


async def test_a_placeholder_that_is_gone_says_so(callers: Callers, tmp_path: Path) -> None:
    async with container(tmp_path / "two", callers.folder) as two:
        placeholder: Placeholder = await callers.next()
        two.kill("KILL")
        await asyncio.wait_for(placeholder.ended, 10)
        with pytest.raises(PlaceholderError, match="it is gone"):
            placeholder.become()
        with pytest.raises(ContainerError):
            await Container(placeholder, "sha256:0123", ["10.1.2.3"]).open()


async def test_callers_are_heard_when_descriptors_are_there_again(
    callers: Callers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent that was deaf after one failure would leave every later pod of its node to wait."""
    monkeypatch.setattr("zerowake_shared.background._FIRST_PAUSE", 0.05)
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, 3

    async def fails(listener: socket.socket) -> object:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(24, "Too many open files")
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", fails)
    for number in range(2):  # one is taken by the accept that had begun before
        async with container(tmp_path / f"c{number}", callers.folder):
            assert (await callers.next()).command
    assert "Too many open files" in caplog.text


@pytest.mark.parametrize(
    "message", [b"", b"x", b"\0" * 100, b"exited\0", b"exited\0x\0y\0", b"hello\0", b"spawned\0nan\0", b"hello" + b"\0-" * 9000]
)
async def test_a_caller_that_says_nonsense_is_hung_up_on(callers: Callers, message: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restore_agent.places.placeholder._GREETING_SECONDS", 0.5)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.connect(str(callers.folder / SOCKET))
        caller.send(message) if message else caller.shutdown(socket.SHUT_WR)
        caller.settimeout(10)
        assert await asyncio.to_thread(caller.recv, 10) == b""
    assert callers.waiting.empty()


# A container with an engine is asked to end.


@contextlib.asynccontextmanager
async def serving(folder: Path, callers: Callers, *words: str, hold: float = 60.0) -> AsyncIterator[tuple[Running, Placeholder]]:
    """A threaded server beside its placeholder, as after a restore."""
    async with container(folder, callers.folder, ["sleep", "1000"]) as two:
        placeholder = await callers.next()
        pid = await placeholder.start([str(PYTHON), "-u", "-c", ENGINE.read_text(), str(PORT), *words], {})
        await until(lambda: "serving" in two.log())
        placeholder.watch_over(pid, PORT, hold)
        yield two, placeholder
        placeholder.close()


class Stream:
    """An answer of ten events, read in a thread from a connection of its own inside of the container's network."""

    def __init__(self, placeholder: Placeholder, path: str = "/stream?n=10&every=0.1", *, half: bool = False) -> None:
        with NetworkNamespace(f"/proc/{placeholder.pid}/ns/net") as network:
            self._socket = network.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
        self._socket.settimeout(20)
        self._socket.connect(("127.0.0.1", PORT))
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        if half:
            self._socket.shutdown(socket.SHUT_WR)
        self.read = b""

    def begin(self) -> None:
        while b"data: 0" not in self.read:
            self.read += self._socket.recv(1 << 16)

    def rest(self) -> bytes:
        while data := self._socket.recv(1 << 16):
            self.read += data
        self._socket.close()
        return self.read


WHOLE = b"data: 9\n\n\r\n0\r\n\r\n"


@pytest.mark.parametrize(("words", "code"), [((), 128 + 15), (("handles",), 5)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("agent_is_there", [True, False])
async def test_an_engine_that_is_asked_to_end_finishes_its_answers(
    callers: Callers, tmp_path: Path, words: tuple[str, ...], code: int, half: bool, agent_is_there: bool
) -> None:
    """As pid 1 it would, if it had no handler; here it dies of what is passed on to it. A client may have closed its half."""
    async with serving(tmp_path / "two", callers, *words) as (two, placeholder):
        stream = Stream(placeholder, half=half)
        await asyncio.to_thread(stream.begin)
        if not agent_is_there:
            placeholder._hang_up("as one that was killed")
        two.kill("TERM")
        two.kill("TERM")  # twice is once
        assert (await asyncio.to_thread(stream.rest)).endswith(WHOLE)
        assert await two.exit_code() == code


async def test_an_idle_engine_ends_at_once_even_where_its_agent_is_gone(callers: Callers, tmp_path: Path) -> None:
    async with serving(tmp_path / "two", callers) as (two, placeholder):
        placeholder.close()
        two.kill("TERM")
        assert await asyncio.wait_for(two.exit_code(), 5) == 128 + 15


async def test_a_client_that_stays_holds_it_until_the_time_is_over(callers: Callers, tmp_path: Path) -> None:
    """Then an engine that hears the signal is told, for its last words; one that does not goes on until it is killed."""
    async with serving(tmp_path / "two", callers, "handles") as (two, placeholder):
        stream = Stream(placeholder)
        await asyncio.to_thread(stream.begin)
        placeholder.hold_until(0.0)
        two.kill("TERM")
        assert (await asyncio.to_thread(stream.rest)).endswith(WHOLE)  # it drains by itself
        assert await two.exit_code() == 5
    async with serving(tmp_path / "three", callers, hold=0.0) as (three, placeholder):
        stream = Stream(placeholder)
        await asyncio.to_thread(stream.begin)
        three.kill("TERM")
        assert (await asyncio.to_thread(stream.rest)).endswith(WHOLE)
        assert await three.exit_code() == 128 + 15


async def test_its_agent_hears_that_it_is_asked_to_end_and_so_does_the_next_one(callers: Callers, tmp_path: Path) -> None:
    async with serving(tmp_path / "two", callers) as (two, placeholder):
        stream = Stream(placeholder, "/stream?n=30&every=0.1")
        await asyncio.to_thread(stream.begin)
        assert not placeholder.asked_to_end.done()
        two.kill("TERM")
        await asyncio.wait_for(placeholder.asked_to_end, 10)
        placeholder._hang_up("as one that was killed")
        again = await callers.next()
        assert again.engine == placeholder.engine
        await asyncio.wait_for(again.asked_to_end, 10)
        again.close()
        await asyncio.to_thread(stream.rest)


async def test_other_signals_do_to_it_what_they_would_do_to_pid_1(callers: Callers, tmp_path: Path) -> None:
    async with serving(tmp_path / "two", callers) as (two, placeholder):
        for number in ("USR1", "HUP", "ALRM"):
            two.kill(number)
        stream = Stream(placeholder)
        assert (await asyncio.to_thread(stream.rest)).endswith(WHOLE)
        two.kill("QUIT")
        assert await two.exit_code() == 128 + 3
