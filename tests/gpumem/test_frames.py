"""Frames: what is sent arrives, and what nobody sends is refused without losing a descriptor."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpumem.wire.frames import PACKET, Assembler, Channel, ProtocolViolation, packets, receive, send
from tests.worlds.processes import descriptors

pytestmark = pytest.mark.usefixtures("no_garbage")


def pair() -> tuple[socket.socket, socket.socket]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    right.settimeout(5)
    return left, right


@given(length=st.one_of(st.integers(0, 200_000), st.integers(PACKET - 10, PACKET + 2)), count=st.integers(0, 600))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_message_arrives_whole(length: int, count: int) -> None:
    before = len(descriptors(os.getpid()))
    payload = os.urandom(length)
    file = os.memfd_create("file")
    os.write(file, b"content")
    left, right = pair()
    with left, right:
        send(left, payload, [file] * count)
        frame = receive(right)
        assert frame.payload == payload
        assert [os.pread(fd, 10, 0) for fd in frame.descriptors] == [b"content"] * count
        frame.close()
    os.close(file)
    assert len(descriptors(os.getpid())) == before


async def test_messages_of_several_senders_do_not_mix() -> None:
    left, right = pair()
    sender, receiver = Channel(left), Channel(right)
    file = os.memfd_create("file")
    payloads = [bytes([number]) * 70_000 for number in range(20)]
    sending = asyncio.gather(*(sender.send(payload, [file] * 300) for payload in payloads))
    arrived = []
    for _ in payloads:
        frame = await receiver.receive()
        assert len(frame.descriptors) == 300
        frame.close()
        arrived.append(frame.payload)
    await sending
    assert sorted(arrived) == payloads
    sender.close()
    receiver.close()
    os.close(file)


def header(kind: int, count: int, length: int) -> bytes:
    return struct.pack("<BxHI", kind, count, length)


REFUSED: dict[str, list[tuple[bytes, int]]] = {  # packets, each with a number of descriptors
    "shorter than a header": [(b"abc", 0)],
    "longer than a packet": [(header(1, 0, PACKET) + b"x" * PACKET, 0)],
    "a length that is not so": [(header(1, 0, 5) + b"abcd", 0)],
    "no such kind": [(header(9, 0, 0), 0)],
    "descriptors of no message": [(header(3, 0, 0), 1)],
    "a message within a message": [(header(1, 2, 0), 1), (header(1, 0, 0), 0)],
    "more descriptors than were said": [(header(1, 1, 0), 2)],
    "too many descriptors": [(header(1, 5000, 0), 0)],
    "a spilled message without a memfd": [(header(2, 0, 0), 0)],
    "a spilled message in a memfd that can change": [(header(2, 0, 0), 1)],
    "a continuation with bytes": [(header(1, 2, 0), 1), (header(3, 0, 1) + b"x", 1)],
    "a continuation without descriptors": [(header(1, 2, 0), 1), (header(3, 0, 0), 0)],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_breaks_a_rule_is_refused(what: str) -> None:
    before = len(descriptors(os.getpid()))
    file = os.memfd_create("file")
    left, right = pair()
    with left, right:
        for data, count in REFUSED[what]:
            socket.send_fds(left, [data], [file] * count)
        with pytest.raises(ProtocolViolation):
            receive(right)
    os.close(file)
    assert len(descriptors(os.getpid())) == before


def test_a_spilled_message_in_a_pipe_is_refused() -> None:
    reading, writing = os.pipe()
    left, right = pair()
    with left, right:
        socket.send_fds(left, [header(2, 0, 0)], [reading])
        with pytest.raises(ProtocolViolation):
            receive(right)
    os.close(reading)
    os.close(writing)


@given(sent=st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_packets_at_all_are_a_frame_or_refused(sent: list[tuple[bytes, int]]) -> None:
    before = len(descriptors(os.getpid()))
    file = os.memfd_create("file")
    left, right = pair()
    assembler = Assembler()
    with left, right:
        for data, count in sent:
            socket.send_fds(left, [data], [file] * count)
        left.shutdown(socket.SHUT_WR)
        try:
            while True:
                frame = assembler.receive(right)
                if frame is not None:
                    frame.close()
        except (ProtocolViolation, EOFError):
            pass
    assembler.close()
    os.close(file)
    assert len(descriptors(os.getpid())) == before


def test_what_does_not_fit_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="are the most"):
        packets(b"x" * (17 << 20), [])
