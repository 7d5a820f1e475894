"""The C parts under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, as far as seconds allow: `python -m tests.sanitized`
is all of it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import zerowake_native

from restore_agent.places.placeholder import SOCKET
from restore_agent.places.sandbox import Sandbox
from restore_agent.workload.renewal import VARIABLE
from tests import sanitized
from tests.worlds.needs import missing_for_criu
from tests.worlds.renewing import INSTEAD
from tests.worlds.waiting import until

GCC = sanitized.compiler()
pytestmark = pytest.mark.skipif(GCC is None, reason="needs gcc and its sanitizers (libasan, libtsan)")


# Every way into a container, of views and of programs; a pid namespace of its own; and links that lead out.
JOINING = "test_the_process_that_was_dumped_comes_back_in_another_container", "test_links_of_a_tenant_lead_nowhere"
ALONE = "--noconftest"  # what that imports, and these tests need none of, takes most of their time under ThreadSanitizer
Change = tuple[str, str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert GCC
    place = tmp_path_factory.mktemp("sanitized")
    sanitized.build(GCC, place)
    return place


@pytest.fixture(scope="module")
def built_for_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert GCC
    place = tmp_path_factory.mktemp("sanitized-threads")
    sanitized.build_for_threads(GCC, place)
    return place


def tried(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Other tests, with what is sanitized."""
    asked = [*command, "-p", "no:cacheprovider"]
    return subprocess.run(asked, env=environment, capture_output=True, text=True, check=False, cwd=sanitized.ROOT)


def passes(command: Sequence[str], environment: dict[str, str]) -> None:
    """They do; what they lack of the machine is said as if they were tests of this file."""
    ran = tried(command, environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if lacks := [line for line in ran.stdout.splitlines() if line.startswith("SKIPPED")]:
        pytest.skip("; ".join(lacks))


def planted(source: Path, folder: Path, how: Sequence[str], *changes: Change) -> Path:
    """The library with faults."""
    assert GCC
    text = source.read_text()
    for right, wrong in changes:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    (folder / source.name).write_text(text)
    sanitized.compile_(GCC, folder / source.name, folder / "planted.so", how)
    return folder / "planted.so"


def test_page_fill_and_renewal(built: Path) -> None:
    assert GCC
    command = sanitized.command(*sanitized.files(("native", "renewal_at_start", "renewal_preloaded")))
    passes(command, sanitized.environment(GCC, built))


@pytest.mark.skipif(bool(missing_for_criu()), reason=missing_for_criu() or "")
def test_join(built: Path) -> None:
    assert GCC
    within = [f"{file}::{name}" for file in sanitized.files(["container"]) for name in JOINING]
    passes(sanitized.command(*sanitized.files(("joining", "container_views")), *within), sanitized.environment(GCC, built))


def test_threads_of_page_fill_and_renewal(built_for_threads: Path) -> None:
    assert GCC
    command = sanitized.command_for_threads(ALONE, *sanitized.files(("native", "renewal_preloaded")))
    passes(command, sanitized.environment_for_threads(GCC, built_for_threads))


def test_a_fault_of_page_fill_is_found(built: Path) -> None:
    """So that those above are more than tests that pass: the ends of no chunk are read beyond."""
    assert GCC
    wrong = (
        "import ctypes; from restore_agent.pages import native; from restore_agent.snapshots.page_runs import PageRun;"
        "native.cut((PageRun * 1)(PageRun(7, 0, 1 << 40)), [4096] * 1000)"
    )
    ran = subprocess.run([sys.executable, "-c", wrong], env=sanitized.environment(GCC, built), capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and "AddressSanitizer" in ran.stderr, ran.stderr


def test_a_fault_of_renewal_is_found(built: Path, tmp_path: Path) -> None:
    assert GCC
    library = planted(sanitized.RENEWAL, tmp_path, sanitized.ADDRESSES, ("!named || strlen(named) >= sizeof(folder)", "!named"))
    preloaded = {"LD_PRELOAD": f"{sanitized.runtime(GCC, 'asan')}:{library}", VARIABLE: "/x" * 4096}
    environment = os.environ | sanitized.OPTIONS | preloaded
    ran = subprocess.run(["true"], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and "AddressSanitizer" in ran.stderr, ran.stderr


def test_a_race_of_page_fill_is_found(built_for_threads: Path, tmp_path: Path) -> None:
    """Threads that take the next pieces, and do not see what others take."""
    assert GCC
    shutil.copytree(built_for_threads / "zerowake_native", tmp_path / "sanitized/zerowake_native")
    library = planted(
        sanitized.PAGE_FILL,
        tmp_path,
        sanitized.THREADS,
        ("first = atomic_load(&fill->next)", "first = *(volatile size_t *)&fill->next"),
        ("while (!atomic_compare_exchange_weak(&fill->next, &first, last));", "while (0);\n*(volatile size_t *)&fill->next = last;"),
    )
    shutil.copy(library, tmp_path / "sanitized/zerowake_native" / zerowake_native.PAGE_FILL.name)
    ran = tried(
        sanitized.command_for_threads(ALONE, *sanitized.files(["native"])), sanitized.environment_for_threads(GCC, tmp_path / "sanitized")
    )
    assert ran.returncode != 0 and "data race" in ran.stderr and "page_fill.c" in ran.stderr, ran.stdout + ran.stderr


def test_a_race_of_renewal_is_found(built_for_threads: Path, tmp_path: Path) -> None:
    """A program that draws, and a thread that says beside it that all is to be new."""
    assert GCC
    library = planted(
        sanitized.RENEWAL,
        tmp_path,
        sanitized.THREADS,
        ("atomic_store(&is_due48, 1)", "is_due48 = 1"),
        ("atomic_load_explicit(&is_due48, memory_order_relaxed) && atomic_exchange(&is_due48, 0)", "is_due48 && !(is_due48 = 0)"),
        ("static atomic_int is_due48;", "static int is_due48;"),
    )
    environment = sanitized.environment_for_threads(GCC, built_for_threads) | {INSTEAD: f"{sanitized.runtime(GCC, 'tsan')}:{library}"}
    ran = tried(sanitized.command_for_threads(ALONE, *sanitized.files(["renewal_preloaded"]), "-k", "draws_is_new", "-x"), environment)
    assert ran.returncode != 0 and "data race" in ran.stderr and "renewal.c" in ran.stderr, ran.stdout + ran.stderr


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
