"""ttrpc within the frames that a container runtime's plugin interface (NRI) puts it into: how bytes become calls, and answers bytes.

    frame      connection, length │ bytes of that connection      one socket carries two: calls to us, and ours to the runtime
    message    length, stream, kind, flags │ payload              of one connection, across frames; a stream is one call
    payload    Request or Response (proto/ttrpc.proto)            which hold the method's own message as bytes

Of ttrpc there are unary calls only: NRI has no others. There is no library of it for Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message
from zerowake_proto import ttrpc_pb2

from restore_agent.errors import AgentError

_INWARDS, _OUTWARDS = 1, 2  # the two connections, by the numbers that NRI gives them
_FRAME = struct.Struct(">II")  # connection, bytes
_HEADER = struct.Struct(">IIBB")  # bytes, stream, kind, flags
_REQUEST, _RESPONSE = 1, 2
_LARGEST = (4 << 20) + _HEADER.size  # bytes
_SENT = 4096  # bytes of a frame: runtimes read frames into a buffer of that size, and hang up where one has more

UNIMPLEMENTED = 12  # the status code of a method that is not there


class TtrpcError(AgentError):
    """The other side has hung up, or sends what is no ttrpc; the text goes on from its name."""


class Connection:
    """Both directions over one socket; `answer` is called, in the event loop, with each request of the other side."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: Callable[[ttrpc_pb2.Request], ttrpc_pb2.Response],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._answer = answer
        self._received: defaultdict[int, bytearray] = defaultdict(bytearray)  # by connection: what is not a whole message yet
        self._streams = itertools.count(1, 2)  # odd ones are the caller's
        self._awaited: dict[int, asyncio.Future[ttrpc_pb2.Response]] = {}
        self.ended = asyncio.create_task(self._serve(), name="ttrpc")  # ends by TtrpcError, or by `aclose`

    async def call(self, service: str, method: str, message: Message) -> ttrpc_pb2.Response:
        """Raises TtrpcError: the other side has ended before it answered."""
        stream = next(self._streams)
        answered: asyncio.Future[ttrpc_pb2.Response] = asyncio.get_running_loop().create_future()
        self._awaited[stream] = answered
        try:
            request = ttrpc_pb2.Request(service=service, method=method, payload=message.SerializeToString())
            self._send(_OUTWARDS, stream, _REQUEST, request)
            either: list[asyncio.Future[Any]] = [answered, self.ended]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                await self.ended
            return await answered
        finally:
            del self._awaited[stream]

    async def aclose(self) -> None:
        self.ended.cancel()
        await asyncio.gather(self.ended, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _serve(self) -> None:
        """Until the other side hangs up. Raises TtrpcError, always."""
        try:
            while True:
                connection, size = _FRAME.unpack(await self._reader.readexactly(_FRAME.size))
                if size > _LARGEST or connection not in (_INWARDS, _OUTWARDS):
                    raise TtrpcError(f"sends a frame of {size} bytes of connection {connection}")
                self._received[connection] += await self._reader.readexactly(size)
                self._take_messages(connection, self._received[connection])
        except (OSError, EOFError) as error:
            raise TtrpcError(f"has hung up ({type(error).__name__})") from None
        except DecodeError as error:
            raise TtrpcError(f"sends what cannot be read: {error}") from None

    def _take_messages(self, connection: int, received: bytearray) -> None:
        """Those that are whole by now."""
        while len(received) >= _HEADER.size:
            size, stream, kind, _ = _HEADER.unpack_from(received)
            if size > _LARGEST:
                raise TtrpcError(f"sends a message of {size} bytes")
            if len(received) < _HEADER.size + size:
                return
            payload = bytes(received[_HEADER.size : _HEADER.size + size])
            del received[: _HEADER.size + size]
            if connection == _INWARDS and kind == _REQUEST:
                self._send(connection, stream, _RESPONSE, self._answer(ttrpc_pb2.Request.FromString(payload)))
            elif connection == _OUTWARDS and kind == _RESPONSE and (answered := self._awaited.get(stream)) and not answered.done():
                answered.set_result(ttrpc_pb2.Response.FromString(payload))

    def _send(self, connection: int, stream: int, kind: int, message: Message) -> None:
        payload = message.SerializeToString()
        whole = _HEADER.pack(len(payload), stream, kind, 0) + payload
        for begin in range(0, len(whole), _SENT):
            part = whole[begin : begin + _SENT]
            self._writer.write(_FRAME.pack(connection, len(part)) + part)
