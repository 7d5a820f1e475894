"""A blocking connection, at a server that is this test: an answer is of the request that was just made, or the connection is over."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire.blocking_connection import BlockingConnection
from gpumem.wire.errors import NotFound, PeerGone, VersionMismatch, to_message
from gpumem.wire.frames import VERSION, receive, send

Answer = Callable[[socket.socket, pb.Request], None]


def hello(connection: socket.socket, request: pb.Request) -> None:
    assert (request.hello.version, request.hello.label) == (VERSION, "test")
    send(connection, pb.Reply(id=request.id, welcome=pb.Welcome(version=VERSION, namespace="red")).SerializeToString())


def nothing(connection: socket.socket, request: pb.Request) -> None:
    """No answer."""


def bye(connection: socket.socket, request: pb.Request) -> None:
    connection.close()


def done(connection: socket.socket, request: pb.Request) -> None:
    send(connection, pb.Reply(id=request.id, done=pb.Done(leases=3)).SerializeToString())


@contextmanager
def answering(folder: Path, *answers: Answer) -> Iterator[Path]:
    """A server of one connection, that answers each request in its way and then waits for the client to hang up."""
    path = folder / "gpumem.sock"
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    answer(connection, pb.Request.FromString(receive(connection).payload))
                if connection.fileno() >= 0:
                    assert connection.recv(1) == b""
        except BaseException as error:
            failed.append(error)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join(10)
    assert not thread.is_alive()
    assert failed == []


STATUS = pb.Request(status=pb.GetStatus())


def test_a_request_and_its_answer(tmp_path: Path) -> None:
    with answering(tmp_path, hello, done) as path:
        connection = BlockingConnection(path, "test")
        assert connection.welcome.namespace == "red"
        reply, frame = connection.ask(STATUS)
        assert (reply.done.leases, frame.descriptors) == (3, [])
        connection.close()
        connection.close()


def test_descriptors_of_an_answer_are_the_callers(tmp_path: Path) -> None:
    def lend(connection: socket.socket, request: pb.Request) -> None:
        fd = os.memfd_create("lent")
        os.write(fd, b"content")
        send(connection, pb.Reply(id=request.id, granted=pb.Granted(lease=1)).SerializeToString(), [fd])
        os.close(fd)

    with answering(tmp_path, hello, lend) as path:
        connection = BlockingConnection(path, "test")
        _, frame = connection.ask(STATUS)
        assert os.pread(frame.descriptors[0], 10, 0) == b"content"
        frame.close()
        connection.close()


def test_an_error_is_raised_and_the_connection_goes_on(tmp_path: Path) -> None:
    def refuse(connection: socket.socket, request: pb.Request) -> None:
        send(connection, pb.Reply(id=request.id, error=to_message(NotFound("no such region"))).SerializeToString())

    with answering(tmp_path, hello, refuse, done) as path:
        connection = BlockingConnection(path, "test")
        with pytest.raises(NotFound, match="no such region"):
            connection.ask(STATUS)
        assert connection.ask(STATUS)[0].done.leases == 3
        connection.close()


def test_an_error_of_no_request_ends_the_connection(tmp_path: Path) -> None:
    def refuse(connection: socket.socket, request: pb.Request) -> None:
        send(connection, pb.Reply(error=to_message(VersionMismatch("the other is older"))).SerializeToString())

    with answering(tmp_path, refuse) as path, pytest.raises(VersionMismatch, match="older"):
        BlockingConnection(path, "test")


def test_no_server_is_told_with_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(PeerGone, match=f"gpumem serve --socket {tmp_path}/none"):
        BlockingConnection(tmp_path / "none", "test")


@pytest.mark.parametrize(("how", "why"), [(nothing, "it did not answer"), (bye, "is gone")])
def test_without_an_answer_it_is_over(tmp_path: Path, how: Answer, why: str) -> None:
    """An answer that came later would be taken for the next request's."""
    with answering(tmp_path, hello, how) as path:
        connection = BlockingConnection(path, "test")
        with pytest.raises(PeerGone, match=f"{why}.*stays valid"):
            connection.ask(STATUS, seconds=0.05)
        assert not connection.open
        with pytest.raises(PeerGone, match="resume"):
            connection.ask(STATUS)


def test_bytes_that_are_no_message_end_it(tmp_path: Path) -> None:
    def babble(connection: socket.socket, request: pb.Request) -> None:
        connection.send(b"xyz")

    with answering(tmp_path, hello, babble) as path:
        connection = BlockingConnection(path, "test")
        with pytest.raises(PeerGone, match="shorter than a header"):
            connection.ask(STATUS)
        assert not connection.open
