"""Sockets in another network namespace, with real ones, and what becomes of a process that does not find back."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worlds.network_namespace import network_namespace
from zerowake_shared.network_namespace import NetworkNamespace


def here() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


@pytest.fixture
def path() -> Iterator[str]:
    with network_namespace() as name:
        yield f"/run/netns/{name}"


def test_a_socket_lives_there_and_its_maker_here(path: str) -> None:
    ours = here()
    with NetworkNamespace(path) as network, network.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        assert here() == ours
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.socket() as outside, pytest.raises(ConnectionRefusedError):
            outside.connect(listening.getsockname())
        with network.socket(socket.AF_INET, socket.SOCK_STREAM) as inside:
            inside.connect(listening.getsockname())
            accepted, _ = listening.accept()
            with accepted:
                accepted.sendall(b"hello")
                assert inside.recv(16) == b"hello"
    assert here() == ours


def test_a_socket_that_cannot_be_made_leads_back_too(path: str) -> None:
    ours = here()
    with NetworkNamespace(path) as network, pytest.raises(OSError, match="Invalid argument"):
        network.socket(socket.AF_INET, 77)
    assert here() == ours


def test_threads_do_not_disturb_each_other(path: str) -> None:
    ours, strayed = here(), []

    def make(network: NetworkNamespace) -> None:
        for _ in range(500):
            network.socket(socket.AF_INET, socket.SOCK_STREAM).close()
            if here() != ours:
                strayed.append(here())

    with NetworkNamespace(path) as network:
        threads = [threading.Thread(target=make, args=(network,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not strayed and here() == ours


def test_it_is_held_open_when_its_name_has_gone(path: str) -> None:
    with NetworkNamespace(path) as network:
        subprocess.run(["ip", "netns", "delete", Path(path).name], check=True)
        try:
            with network.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
                listening.bind(("127.0.0.1", 0))  # loopback is up: it is the same one
        finally:
            subprocess.run(["ip", "netns", "add", Path(path).name], check=True)


def test_nothing_stays_open_where_there_is_no_namespace(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(FileNotFoundError, match="no-such"):
        NetworkNamespace(tmp_path / "no-such")
    assert descriptors() == before


def test_what_is_no_namespace_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ours = here()
    with NetworkNamespace(tmp_path / "file") as network, pytest.raises(OSError, match=r"cannot enter the network namespace .*file"):
        network.socket(socket.AF_INET, socket.SOCK_STREAM)
    assert here() == ours


LOST = """
    import atexit, os, socket, sys
    from pathlib import Path
    from zerowake_shared.network_namespace import NetworkNamespace

    home = os.readlink("/proc/self/ns/net")
    network = NetworkNamespace(sys.argv[1])
    (descriptor,) = [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists() and os.readlink(path) == home]
    nowhere = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nowhere, descriptor)
    atexit.register(print, "went on")
    try:
        network.socket(socket.AF_INET, socket.SOCK_STREAM)
    except BaseException:
        pass
    print("went on")
"""


def test_a_process_that_does_not_find_back_ends_at_once(path: str) -> None:
    """Nothing that catches exceptions can go on in a stranger's network."""
    ended = run(LOST, path)
    assert (ended.returncode, ended.stdout) == (70, "")
    assert path in ended.stderr and "cannot be left" in ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give up its rights")
def test_a_process_without_the_right_is_told_and_stays(path: str) -> None:
    program = """
        import os, socket, sys
        from zerowake_shared.network_namespace import NetworkNamespace

        network = NetworkNamespace(sys.argv[1])
        os.setuid(65534)
        try:
            network.socket(socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            print(error.errno, error)
    """
    ended = run(program, path)
    assert ended.stdout.startswith("1 ") and "CAP_SYS_ADMIN" in ended.stdout, ended.stderr
