"""ttrpc's framing, against a far side that speaks it byte by byte."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from zerowake_proto import nri_pb2, ttrpc_pb2

from restore_agent.kubernetes.ttrpc import Connection, TtrpcError

INWARDS, OUTWARDS = 1, 2
REQUEST, RESPONSE = 1, 2


class FarSide:
    """The other end of a connection whose requests are answered by their method's name."""

    def __init__(self, ours: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ours = ours
        self._reader = reader
        self.writer = writer

    def send(self, connection: int, stream: int, kind: int, payload: bytes, piece: int = 1 << 20) -> None:
        message = struct.pack(">IIBB", len(payload), stream, kind, 0) + payload
        for at in range(0, len(message), piece):
            part = message[at : at + piece]
            self.writer.write(struct.pack(">II", connection, len(part)) + part)

    async def receive(self) -> tuple[int, int, int, bytes]:
        connection, size = struct.unpack(">II", await asyncio.wait_for(self._reader.readexactly(8), 10))
        length, stream, kind, _ = struct.unpack(">IIBB", await self._reader.readexactly(10))
        assert size == 10 + length
        return connection, stream, kind, await self._reader.readexactly(length)


@pytest.fixture
async def far() -> AsyncIterator[FarSide]:
    here, there = socket.socketpair()
    ours = Connection(
        *await asyncio.open_unix_connection(sock=here), lambda request: ttrpc_pb2.Response(payload=f"to {request.method}".encode())
    )
    reader, writer = await asyncio.open_unix_connection(sock=there)
    try:
        yield FarSide(ours, reader, writer)
    finally:
        await ours.aclose()
        writer.close()


def response(payload: bytes) -> bytes:
    return ttrpc_pb2.Response(payload=payload).SerializeToString()


async def test_a_request_is_answered_on_its_stream_however_it_was_cut(far: FarSide) -> None:
    for stream, piece in ((1, 1), (3, 7), (5, 1 << 20)):
        far.send(INWARDS, stream, REQUEST, ttrpc_pb2.Request(method=f"M{stream}").SerializeToString(), piece)
        connection, answered, kind, payload = await far.receive()
        assert (connection, answered, kind) == (INWARDS, stream, RESPONSE)
        assert ttrpc_pb2.Response.FromString(payload).payload == f"to M{stream}".encode()


async def test_frames_of_both_connections_may_alternate_within_messages(far: FarSide) -> None:
    calling = asyncio.create_task(far.ours.call("a.Service", "Ask", nri_pb2.Empty()))
    connection, stream, kind, payload = await far.receive()
    assert (connection, kind) == (OUTWARDS, REQUEST) and ttrpc_pb2.Request.FromString(payload).service == "a.Service"
    answer, request = response(b"x" * 40), ttrpc_pb2.Request(method="Other").SerializeToString()
    parts = {
        OUTWARDS: struct.pack(">IIBB", len(answer), stream, RESPONSE, 0) + answer,
        INWARDS: struct.pack(">IIBB", len(request), 9, REQUEST, 0) + request,
    }
    while any(parts.values()):
        for number in parts:
            part, parts[number] = parts[number][:8], parts[number][8:]
            if part:
                far.writer.write(struct.pack(">II", number, len(part)) + part)
    assert (await calling).payload == b"x" * 40
    assert (await far.receive())[:3] == (INWARDS, 9, RESPONSE)


async def test_answers_find_their_calls_in_any_order(far: FarSide) -> None:
    calls = [asyncio.create_task(far.ours.call("S", method, nri_pb2.Empty())) for method in ("one", "two")]
    streams = {}
    for _ in calls:
        _, stream, _, payload = await far.receive()
        streams[ttrpc_pb2.Request.FromString(payload).method] = stream
    far.send(OUTWARDS, 77, RESPONSE, response(b"nobody's"))
    for method in ("two", "one"):
        far.send(OUTWARDS, streams[method], RESPONSE, response(method.encode()))
    assert [(await call).payload for call in calls] == [b"one", b"two"]


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "has hung up"),
        (struct.pack(">II", INWARDS, 1 << 30), "sends a frame of 1073741824 bytes"),
        (struct.pack(">II", INWARDS, 10) + struct.pack(">IIBB", 1 << 30, 1, REQUEST, 0), "sends a message of 1073741824 bytes"),
        (struct.pack(">II", INWARDS, 13) + struct.pack(">IIBB", 3, 1, REQUEST, 0) + b"\xff\xff\xff", "sends what cannot be read"),
    ],
)
async def test_what_is_no_ttrpc_ends_the_connection_and_every_call(far: FarSide, sent: bytes, why: str) -> None:
    calling = asyncio.create_task(far.ours.call("S", "M", nri_pb2.Empty()))
    await far.receive()
    far.writer.write(sent)
    if not sent:
        far.writer.close()
    with pytest.raises(TtrpcError, match=why):
        await asyncio.wait_for(calling, 10)
    with pytest.raises(TtrpcError, match=why):
        await far.ours.ended
