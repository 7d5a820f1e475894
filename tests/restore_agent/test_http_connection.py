"""One connection to an agent or a bucket: what comes with the head, in parts, and what is no answer."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from restore_agent.transfer.http_connection import Connection
from restore_agent.transfer.peer_server import AGENT
from restore_agent.transfer.source import Absent, Denied, Unreachable
from tests.worlds.certificates import Authority
from tests.worlds.peers import fleet_files
from zerowake_shared.address import Address
from zerowake_shared.tls import TlsFiles, client_contexts, server_context


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return fleet_files(tmp_path / "tls", Authority("fleet"))


@contextlib.contextmanager
def connected(tls: TlsFiles, *parts: bytes) -> Iterator[tuple[Connection, Callable[[], None]]]:
    """To one that answers by these parts: the first when it is asked, each other one when the function is called, then it ends."""
    more = threading.Semaphore(0)

    def serve() -> None:
        with contextlib.suppress(OSError), server_context(tls).wrap_socket(listener.accept()[0], server_side=True) as there:
            there.recv(4096)
            for number, part in enumerate(parts):
                if number:
                    more.acquire()
                there.sendall(part)
            more.acquire()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        address = Address("127.0.0.1", listener.getsockname()[1])
        connection = Connection(address, AGENT, client_contexts(tls), lambda one: None)
        yield connection, more.release
        connection.close()
        for _ in parts:
            more.release()
        serving.join()


def ask(connection: Connection, method: str = "GET") -> int:
    return connection.ask(method, "/x", {}, 0.0)


def test_what_comes_with_the_head_is_of_the_answer(tls: TlsFiles) -> None:
    with connected(tls, b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nwith", b"more") as (connection, go_on):
        assert ask(connection) == 8
        assert not connection.is_done
        memory = memoryview(bytearray(8))
        go_on()
        assert connection.read_into(memory[:3]) == 3
        assert connection.read_into(memory[3:]) == 5
        assert bytes(memory) == b"withmore"
        assert connection.is_done


def test_one_whose_whole_answer_comes_with_its_head_is_kept(tls: TlsFiles) -> None:
    with connected(tls, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nxy") as (connection, _):
        assert ask(connection) == 2
        assert connection.read_into(memoryview(bytearray(2))) == 2
        assert connection.is_done


def test_one_that_closes_behind_its_answer_is_not_kept(tls: TlsFiles) -> None:
    with connected(tls, b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nxy") as (connection, _):
        assert ask(connection) == 2
        assert connection.read_into(memoryview(bytearray(2))) == 2
        assert not connection.is_done


def test_a_length_without_a_body(tls: TlsFiles) -> None:
    with connected(tls, b"HTTP/1.1 200 OK\r\nContent-Length: 77\r\n\r\n") as (connection, _):
        assert ask(connection, "HEAD") == 77
        assert connection.is_done


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot here\n", Absent, "^not here$"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", Denied, "does not let us"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 9000\r\n\r\n" + 9000 * b"x", Unreachable, "^x{4096}$"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", Unreachable, "it answered 500"),
        (b"HTTP/1.1 200 OK\r\nX: " + 40000 * b"x", Unreachable, "head of its answer is too long"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", Unreachable, "is none of HTTP's"),
        (b"HTTP/1.1 200 OK\r\n\r\n", Unreachable, "does not say how long"),
    ],
)
def test_what_is_not_given(tls: TlsFiles, answer: bytes, error: type[Exception], why: str) -> None:
    with connected(tls, answer) as (connection, _), pytest.raises(error, match=why):
        ask(connection)


def test_what_came_before_a_silence_or_an_end_is_given(tls: TlsFiles) -> None:
    with connected(tls, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\none", b"two", b"th") as (connection, go_on):
        assert ask(connection) == 9
        memory = memoryview(bytearray(9))
        assert connection.read_into(memory) == 3
        go_on()
        assert connection.read_into(memory[3:]) == 3
        go_on()
        go_on()
        assert connection.read_into(memory[6:]) == 2
        assert bytes(memory[:8]) == b"onetwoth"
        with pytest.raises(Unreachable, match=r"ended in the middle|broke off|[Cc]onnection"):
            connection.read_into(memory[8:])
