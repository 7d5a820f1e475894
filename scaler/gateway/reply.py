"""An answer on its way to the client: head and body as bytes, on the connection that aiohttp's server reads requests from.

aiohttp's own response would decode each field and encode it again, lose the bytes that are no text, add fields of its own, and cost a task
of the event loop for every piece. This one writes to the transport. To aiohttp it is a response that is prepared and ended already, of
which only `keep_alive` is asked. What a client gets is framed for that client: by length where there is one, by chunks, or for HTTP/1.0
by the end of the connection.

A client that takes nothing of an answer that waits for it keeps a place on a replica from others. After STALLED_SECONDS in which it has not
acknowledged a single byte, its connection is cut. TCP's keepalive does not notice it: its kernel answers.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import struct
import termios
from email.utils import formatdate
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

from scaler.gateway.answer_parser import Fields, Head

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

log = logging.getLogger(__name__)

STALLED_SECONDS = 120.0
_RESET = struct.pack("ii", 1, 0)


class ClientStalled(ConnectionResetError):
    """The client has taken nothing for so long that its connection was cut."""


class Reply(web.StreamResponse):
    """What one client gets. closes: its connection is closed afterwards, and the head says so."""

    # aiohttp's own constructor makes what is never looked at here.
    def __init__(self, request: web.BaseRequest, *, closes: bool = False) -> None:
        self._status = 0
        self._request = request
        self._connection = request.protocol
        self._writer = request.writer
        self._modern = request.version >= HttpVersion11
        self._keep_alive = request.keep_alive and not closes
        self._chunks = False
        self._ends_by_closing = False
        self._head = b""  # waits for the first of the body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to do: `finish` did it."""

    def hint(self, head: Head) -> None:
        """Sends an informational answer, to a client that can know of such."""
        if self._modern and head.status != 100:
            self._put(b"\r\n".join((b"HTTP/1.1 %d %b" % (head.status, head.reason), *_lines(head.fields), b"\r\n")))

    def begin(self, head: Head, told: Fields = []) -> None:  # noqa: B006  (never changed)
        """The head: it goes out with the first of the body, or the end. told: what the gateway adds to the engine's fields."""
        status = self._status = head.status
        modern = self._modern
        lines = [b"%b %d %b" % (b"HTTP/1.1" if modern else b"HTTP/1.0", status, head.reason), *_lines(head.fields), *_lines(told)]
        if head.upgrade and status in (101, 426):
            lines.append(b"Connection: upgrade\r\nUpgrade: " + head.upgrade)
            self._keep_alive = self._keep_alive and status == 426
        elif head.length is None:
            self._chunks, self._ends_by_closing = modern, not modern
            self._keep_alive = self._keep_alive and modern
            if modern:
                lines.append(b"Transfer-Encoding: chunked")
        if not head.dated:
            lines.append(b"Date: " + formatdate(usegmt=True).encode())
        if modern and not self._keep_alive and status != 101:
            lines.append(b"Connection: close")
        elif self._keep_alive and not modern:
            lines.append(b"Connection: keep-alive")
        lines.append(b"\r\n")
        self._head = b"\r\n".join(lines)

    def take(self, piece: bytes) -> bool:
        """Sends some of the body. Returns False where the client does not keep up: `emptied` waits for it."""
        transport = self._connection.transport
        if transport is None:
            return True  # the client has gone, and the handler is being cancelled
        if self._chunks:
            piece = b"%b%x\r\n%b\r\n" % (self._head, len(piece), piece)
        elif self._head:
            piece = self._head + piece
        self._head = b""
        self._writer.output_size += len(piece)
        transport.write(piece)
        return not self._connection.writing_paused

    async def emptied(self) -> None:
        """Returns when the client has taken most of what was sent. Raises: ConnectionError: it has gone, or is cut as it takes nothing."""
        waits = self._untaken()
        draining = asyncio.ensure_future(self._writer.drain())  # aiohttp's cannot be awaited again once it was cancelled
        try:
            while not (await asyncio.wait((draining,), timeout=STALLED_SECONDS))[0]:
                before, waits = waits, self._untaken()
                if waits >= before:
                    self.cut()
                    log.info("a client has taken nothing of its answer for %g s: its connection is cut", STALLED_SECONDS)
                    raise ClientStalled(f"the client has taken nothing of its answer for {STALLED_SECONDS:g} s")
            draining.result()
        finally:
            draining.cancel()

    def _untaken(self) -> int:
        """Bytes that the client's system has not acknowledged. Nothing is sent meanwhile, so they can only become fewer."""
        transport = self._connection.transport
        if transport is None or transport.is_closing():
            return 0
        sent = bytearray(4)
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, sent)
        return transport.get_write_buffer_size() + int.from_bytes(sent, "little")

    async def taken(self) -> None:
        """Returns at once where the client keeps up, else when it does: one that sends requests and reads no answers fills no memory."""
        if self._connection.writing_paused:
            await self.emptied()

    def finish(self, trailers: Fields = []) -> None:  # noqa: B006  (never changed)
        """The proper end of the answer."""
        if self._chunks:
            self._put(self._head + _last_chunk(trailers))
        elif self._head:
            self._put(self._head)
        self._head = b""

    def finish_whole(self, body: bytes, trailers: Fields) -> None:
        """All of the body and the proper end, in one packet."""
        if body and self._chunks:
            self._put(b"%b%x\r\n%b\r\n%b" % (self._head, len(body), body, _last_chunk(trailers)))
        elif body:
            self._put(self._head + body)
        else:
            self.finish(trailers)
        self._head = b""

    def cut(self) -> None:
        """Ends the connection without the answer's proper end: that is how the client learns that it is not whole."""
        self._keep_alive = False
        transport = self._connection.transport
        if transport is None:
            return
        if self._connection.writing_paused or self._ends_by_closing:
            # What waits will not be taken soon, or the end of the connection would be the proper end: it has to be an error.
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()
        else:
            transport.close()

    def _put(self, data: bytes) -> None:
        transport = self._connection.transport
        if transport is not None:
            self._writer.output_size += len(data)
            transport.write(data)


def _lines(fields: Fields) -> list[bytes]:
    return [b": ".join(field) for field in fields]


def _last_chunk(trailers: Fields) -> bytes:
    return b"\r\n".join((b"0", *_lines(trailers), b"\r\n")) if trailers else b"0\r\n\r\n"
