"""The server under any packets and any requests at all: it goes on serving, keeps its books, and gives everything back."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire.frames import VERSION, ProtocolViolation, packets, receive, send
from tests.worlds.gpumem_server import MIB, Served, Weights, until

KEYS = [bytes([number]) * 32 for number in range(3)]
LAYOUTS = [pb.Layout(size=size).SerializeToString() for size in (1, 3 * MIB, 100 * MIB, 1 << 59)]
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_UINT64: st.one_of(st.integers(0, 9), st.sampled_from([2 * MIB, 5 * MIB, 300 * MIB]), st.integers(0, 2**64 - 1)),
    FieldDescriptor.TYPE_UINT32: st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1)),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: st.one_of(st.floats(0, 0.05), st.sampled_from([-1.0, float("nan"), float("-inf")])),
    FieldDescriptor.TYPE_STRING: st.one_of(st.just("host"), st.just(""), st.just("red"), st.text(max_size=10)),
    FieldDescriptor.TYPE_BYTES: st.one_of(st.sampled_from(KEYS), st.sampled_from(LAYOUTS), st.binary(max_size=40)),
}
UNWANTED = ("hello", "reserve", "quota")  # what would change the server for the tests that follow


def messages(descriptor: Descriptor, make: Callable[[], Message], depth: int = 0) -> st.SearchStrategy[Message]:
    """Any message of a type, fields set or not."""

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = make()
        for field in descriptor.fields:
            if field.containing_oneof or draw(st.integers(0, 3)) == 0:
                continue
            fill(draw, message, field)
        for choice in descriptor.oneofs:
            field = draw(st.sampled_from([field for field in choice.fields if field.name not in UNWANTED]))
            fill(draw, message, field)
        return message

    def fill(draw: st.DrawFn, message: Message, field: FieldDescriptor) -> None:
        many = field.is_repeated
        for _ in range(draw(st.integers(0, 2)) if many else 1):
            if field.message_type is not None:
                into = getattr(message, field.name).add() if many else getattr(message, field.name)
                into.SetInParent()
                into.MergeFrom(draw(messages(field.message_type, type(into), depth + 1)))
            elif many:
                getattr(message, field.name).append(draw(SCALARS[field.type]))
            else:
                setattr(message, field.name, draw(SCALARS[field.type]))

    return build()


def connect(server: Served) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(str(server.socket))
    return connection


def greet(connection: socket.socket) -> None:
    send(connection, pb.Request(id=1, hello=pb.Hello(version=VERSION, label="fuzz")).SerializeToString())
    receive(connection).close()


def files_of(server: Served) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))  # noqa: PTH208


def settle(server: Served) -> None:
    until(lambda: server.status().connections == 1 and not server.status().leases)


@pytest.fixture(scope="module", autouse=True)
def no_descriptor_is_lost(server: Served) -> Any:
    settle(server)
    before = files_of(server)
    yield
    settle(server)
    until(lambda: files_of(server) <= before + 8, 5)  # tenants' sockets


@given(sent=st.lists(st.tuples(st.binary(max_size=100), st.integers(0, 3)), min_size=1, max_size=5), greeted=st.booleans())
@SETTINGS
def test_any_packets(server: Served, sent: list[tuple[bytes, int]], greeted: bool) -> None:
    with connect(server) as connection, open(os.devnull, "rb") as file:  # noqa: PTH123
        if greeted:
            greet(connection)
        with contextlib.suppress(OSError):
            for data, count in sent:
                socket.send_fds(connection, [data], [file.fileno()] * count)
    assert server.host.wanted_bytes == 192 * MIB


@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 200))
@SETTINGS
def test_changed_bytes(server: Served, weights: Weights, changes: list[tuple[int, int]], cut: int) -> None:
    fill = pb.Fill(layout=weights.layout, device="host", sources=[pb.Source(chunks=weights.chunks, offset=weights.offset)])
    data = bytearray(packets(pb.Request(id=2, fill=fill).SerializeToString(), [0])[0][0])
    for at, value in changes:
        data[at % len(data)] = value
    with connect(server) as connection, weights.path.open("rb") as file:
        greet(connection)
        with contextlib.suppress(OSError, EOFError, ProtocolViolation):
            socket.send_fds(connection, [data[: len(data) - cut] if cut < 20 else data], [file.fileno()])
            connection.settimeout(0.2)
            receive(connection).close()
    assert server.host.wanted_bytes == 192 * MIB


@given(asked=st.lists(messages(pb.Request.DESCRIPTOR, pb.Request), min_size=1, max_size=8))
@SETTINGS
def test_any_requests(server: Served, weights: Weights, asked: list[pb.Request]) -> None:
    """Each of them is answered, or the connection is closed with a word on why."""
    with connect(server) as connection, weights.path.open("rb") as file:
        greet(connection)
        for number, request in enumerate(asked, 2):
            request.id = number
            files = [file.fileno()] * 2 if request.HasField("fill") else []
            try:
                send(connection, request.SerializeToString(), files)
                frame = receive(connection)
            except (EOFError, OSError):
                pytest.fail(f"no answer to {request}")
            frame.close()
            reply = pb.Reply.FromString(frame.payload)
            assert reply.id == number
            assert "failed at this" not in reply.error.message, reply.error.message
    status = server.host
    held = status.free_bytes + status.regions_bytes + status.scratch_bytes + status.owed_bytes
    assert status.wanted_bytes == 192 * MIB == held
