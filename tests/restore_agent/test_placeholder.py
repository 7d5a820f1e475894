"""Placeholders that call: pid 1 of containers that runc made, and callers who say what no placeholder says."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from restore_agent.places.container import Container, ContainerError
from restore_agent.places.placeholder import SOCKET, Placeholder, PlaceholderError
from tests.worlds.containers import Callers, container

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
            await Container(placeholder, "sha256:0123", "10.1.2.3").open()


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
