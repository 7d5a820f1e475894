"""The C parts under AddressSanitizer and UndefinedBehaviorSanitizer, as far as seconds allow: `python -m tests.sanitized` is all of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zerowake_native

from restore_agent.places.placeholder import SOCKET
from restore_agent.places.sandbox import Sandbox
from tests import sanitized
from tests.worlds.waiting import until

GCC = sanitized.compiler()
pytestmark = pytest.mark.skipif(GCC is None, reason="needs gcc and its sanitizers (libasan)")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert GCC
    place = tmp_path_factory.mktemp("sanitized")
    sanitized.build(GCC, place)
    return place


def test_page_fill(built: Path) -> None:
    assert GCC
    every = "import tests.restore_agent.test_native as found; [getattr(found, name)() for name in dir(found) if name.startswith('test_')]"
    asked = [sys.executable, "-c", f"import tests.worlds.not_preloaded; {every}"]
    ran = subprocess.run(asked, env=sanitized.environment(GCC, built), capture_output=True, text=True, check=False, cwd=sanitized.ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_fault_of_page_fill_is_found(built: Path) -> None:
    """So that the one above is more than a test that passes: the ends of no chunk are read beyond."""
    assert GCC
    wrong = (
        "import ctypes; from restore_agent.pages import native; from restore_agent.snapshots.page_runs import PageRun;"
        "native.cut((PageRun * 1)(PageRun(7, 0, 1 << 40)), [4096] * 1000)"
    )
    ran = subprocess.run([sys.executable, "-c", wrong], env=sanitized.environment(GCC, built), capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and "AddressSanitizer" in ran.stderr, ran.stderr


@contextmanager
def placeholder(built: Path, folder: Path, *command: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """One as a program of this machine, and its agent's end of the socket, which it has greeted."""
    shutil.copy(built / "placeholder", folder / "waits")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / SOCKET))
        listener.listen(4)
        listener.settimeout(20)
        environment = os.environ | sanitized.OPTIONS
        with subprocess.Popen([folder / "waits", "--", *command], env=environment, stderr=subprocess.PIPE) as process:
            try:
                agent, _ = listener.accept()
                with agent:
                    agent.settimeout(20)
                    assert agent.recv(1 << 16).startswith(b"hello\0waiting\0")
                    yield process, agent
            finally:
                process.kill()


def message(*fields: object) -> bytes:
    return b"".join(str(field).encode() + b"\0" for field in fields)


def test_a_placeholder_takes_any_message(built: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    words = [b"engine", b"until", b"engine\0", b"x", b"", b"spawned", b"-1", b"1", b"0", b"\xff" * 300, b"start\0-1\0x", b"start\x0099\0x"]
    with placeholder(built, tmp_path, "true") as (process, agent):
        agent.setblocking(False)
        for _ in range(3000):
            sent = b"\0".join(chance.choice(words) for _ in range(chance.randrange(1, 6))) + chance.choice((b"", b"\0"))
            if not sent:
                continue
            agent.settimeout(20)
            agent.send(sent)
            agent.setblocking(False)
            while True:
                try:
                    agent.recv(1 << 16)
                except BlockingIOError:
                    break
            assert process.poll() is None, process.stderr and process.stderr.read()
        agent.settimeout(20)
        agent.send(message("exit", 7))
        assert process.wait(20) == 7, process.stderr and process.stderr.read()


def test_a_message_that_is_too_long_is_no_command(built: Path, tmp_path: Path) -> None:
    with placeholder(built, tmp_path, "true") as (process, agent):
        agent.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        agent.send(b"exit\0" + b"7" * (1 << 18))
        said = agent.recv(1 << 16)
        assert said.startswith(b"error\0") and b"too long" in said, said
        assert process.poll() is None
        agent.send(message("cold"))
        assert process.wait(20) == 0


def test_one_whose_agent_stands_still_hears_signals(built: Path, tmp_path: Path) -> None:
    """The queue of callers of an agent that is stopped is full: whoever waited in it would be deaf."""
    shutil.copy(built / "placeholder", tmp_path / "waits")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen(0)
        first.connect(str(tmp_path / SOCKET))
        environment = os.environ | sanitized.OPTIONS
        with subprocess.Popen([tmp_path / "waits", "--", "true"], env=environment) as process:
            try:
                while "SigBlk:\tfffffffe" not in (status := Path(f"/proc/{process.pid}/status").read_text()) and "State:\tS" not in status:
                    assert process.poll() is None
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 128 + signal.SIGTERM
            finally:
                process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make namespaces")
@pytest.mark.parametrize(
    "fields", [b"", b"-\0/\0-1\0", b"-\0/\x009223372036854775807\0", b"-\0/\x000\x000\0", b"-\0/\x005\0true\0", b"-\0/\x001\0true"]
)
async def test_a_broken_request_ends_nothing_but_itself(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: bytes
) -> None:
    monkeypatch.setattr(zerowake_native, "SANDBOX_INIT", built / "zerowake_native/sandbox-init")
    for name, value in sanitized.OPTIONS.items():
        monkeypatch.setenv(name, value)
    async with await Sandbox.create(tmp_path / "criu.kdat") as sandbox:
        sandbox._control.send(b"spawn\0" + fields)
        await until(lambda: any(each.done() for each in sandbox._exits.values()))
        assert [os.waitstatus_to_exitcode(each.result()) for each in sandbox._exits.values()] == [1]
        pid = await sandbox.spawn(["true"], {"PATH": os.environ["PATH"]}, "/", [])
        assert await sandbox.exit_of(pid) == 0
