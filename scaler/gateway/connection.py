"""One connection to an engine, as an asyncio protocol: requests out, answers in, and its end told to whoever waits.

Whoever waits here does so on one future, and there are three ways in which it is set: bytes came, the connection ended, or we ended it.
`end` is the one way out: it keeps the reason and sets the future in the same turn, and only then lets the transport go, so that nobody
waits for a transport to say something. (aiohttp's client took a connection away from its reader first: the reader was never told.)

A body is handed to its receiver inside the call that read it, without a turn of the event loop between: `pass_on` wakes up only when the
receiver is full or the answer has ended. A receiver that is full stops the reading, an engine that does not read stops the upload.

An engine may answer and close before it has read the whole request. Its answer is in the socket then, behind an error of our next write:
what is left there is read before the end is told.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterable, Callable
from contextlib import suppress
from typing import Protocol, cast

from scaler.gateway.answer_parser import AnswerParser, BadAnswer, Fields, Head

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_READ = 2**16
_READ_AT_ONCE = 4096  # bytes that every engine's first read takes
# Where the kernel's `struct tcp_info` has them: milliseconds since something was sent, segments that were sent again, bytes.
_LAST_SENT, _SENT_AGAIN, _BYTES_ACKED = slice(44, 48), slice(100, 104), slice(120, 128)
_AHEAD = 4  # reads that are kept before somebody takes them


class Receiver(Protocol):
    """Whoever an answer's body is for."""

    def take(self, piece: bytes) -> bool:
        """Takes some of the body; returns False when it is full: no more comes before `emptied`."""

    async def emptied(self) -> None:
        """Returns when it can take more. Raises: ConnectionError: it has gone."""

    def cut(self) -> None:
        """The rest will not come, and it is not waited for until what it has is taken: `emptied` ends soon."""


class Connection(asyncio.Protocol):
    """A connection to an engine. made: its socket; ended: told when it has ended."""

    __slots__ = (
        "_answered",
        "_before",
        "_error",
        "_full",
        "_hint",
        "_loop",
        "_receiver",
        "_requests",
        "_room",
        "_socket",
        "_told",
        "_transport",
        "_upload",
        "_waiter",
        "_written",
        "parser",
        "untouched",
        "waits",
    )

    def __init__(self, made: socket.socket, ended: Callable[[Connection], None]) -> None:
        self.parser = AnswerParser()
        self._socket = made
        self._told = ended
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None  # why it has ended
        self._waiter: asyncio.Future[None] | None = None
        self._receiver: Receiver | None = None
        self._full = False  # the receiver is, and reading has stopped
        self._hint: Callable[[Head], None] | None = None
        self._room: asyncio.Future[None] | None = None  # there is one while the engine does not read
        self._upload: asyncio.Task[None] | None = None
        self._answered = False  # anything came since the last request
        self._written = self._before = 0  # bytes in all, and before the last request
        self.untouched = False  # it has ended, and its engine has read nothing of the last request
        self.waits = False  # a request was sent whose answer has not begun

    @property
    def usable(self) -> bool:
        """Whether another request can be sent: it looks, since the end of an idle connection may not have been read yet."""
        if self._error is not None or self.parser.excess:
            return False
        try:
            self._socket.recv(1, _PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # its end, or bytes that nobody asked for

    @property
    def free(self) -> bool:
        """Whether the answer has ended and left the connection fit for another one."""
        parser = self.parser
        return parser.done and parser.keeps and not parser.excess and self._upload is None and self._error is None and not self._full

    @property
    def head(self) -> Head:
        """The head of the answer that has begun."""
        assert self.parser.head is not None
        return self.parser.head

    @property
    def trailers(self) -> Fields:
        """The fields behind the answer's body."""
        return self.parser.trailers

    async def ask(
        self,
        method: bytes,
        request: bytes,
        body: AsyncIterable[bytes] | None = None,
        *,
        upgrades: bool = False,
        hint: Callable[[Head], None] | None = None,
    ) -> None:
        """Sends a request; returns when its answer has begun: with the first of its body, or its end where it has none.

        body: what comes after `request`, as it goes over the wire; upgrades: the request asks for another protocol; hint: is
        given informational answers.
        Raises: BadAnswer; OSError: the connection has ended; whatever `body` raises.
        """
        self._before = self._written
        self.untouched = self._error is not None
        self._answered = False
        self.waits = True
        self._hint = hint
        self.parser.expect(method, upgrades=upgrades)
        self._write(request)
        if body is not None:
            self._upload = self._loop.create_task(self._send(body))
        parser = self.parser
        while not parser.pieces and not parser.done and not parser.raw:
            await self._wait()
        self.waits = False

    def whole(self) -> bytes | None:
        """The answer's body, if all of it has come; None: the rest is to be passed on as it comes."""
        if not self.parser.done:
            return None
        pieces = self.parser.pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    async def pass_on(self, receiver: Receiver) -> None:
        """Gives the receiver the rest of the answer, as it comes. Raises: BadAnswer, OSError: it is not whole; what the receiver raises."""
        self._receiver = receiver
        try:
            if self.parser.pieces:
                self._give(receiver)
            while self._full or not self.parser.done:
                if self._full:
                    await receiver.emptied()
                    self._full = False
                    if self._transport is not None and self._error is None:
                        self._transport.resume_reading()
                else:
                    await self._wait()
        finally:
            self._receiver = None

    @property
    def uploads(self) -> bool:
        """Whether the request is still being sent."""
        return self._upload is not None

    async def stop_upload(self) -> None:
        """Returns when nothing more of the request is read from whoever sends it: the answer has ended, and its rest is of no use."""
        upload = self._upload
        if upload is not None:
            upload.cancel()
            await asyncio.wait((upload,))

    def send(self, data: bytes) -> None:
        """Sends bytes after an upgrade."""
        self._write(data)

    @property
    def room(self) -> asyncio.Future[None] | None:
        """What is done when the engine reads again; None: it does."""
        return self._room

    def end(self, error: Exception) -> None:
        """Ends the connection, and says so to whoever waits for it: now. The first error is the one that counts."""
        if self._error is not None:
            return
        self._error = error
        if self._upload is not None:
            self._upload.cancel()
        self._wake()
        if self._full and self._receiver is not None:
            self._receiver.cut()
        if self._transport is not None:
            self._transport.abort()
        self._told(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        parser = self.parser
        try:
            parser.feed(data)
        except BadAnswer as error:
            self._answered = True
            self.end(error)
            return
        receiver = self._receiver
        if receiver is not None:
            pieces = parser.pieces
            if pieces:  # as in _give: a stream's events come this way, each of them
                piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                pieces.clear()
                if not receiver.take(piece):
                    self._pause()
            if parser.done or self._full:
                self._wake()
            return
        self._answered = True
        if parser.hints:
            for hint in parser.hints:
                if self._hint is not None:
                    self._hint(hint)
            parser.hints.clear()
        if parser.done or parser.pieces or parser.raw:
            self._wake()
            if len(parser.pieces) > _AHEAD and not self._full:
                self._pause()

    def eof_received(self) -> None:
        self._look_back(reset=False)
        if not self.parser.feed_end():
            self.end(ConnectionResetError(f"the engine closed the connection {self._stage()}"))
        else:
            self.end(ConnectionResetError("the engine closed the connection"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._error is None:
            if isinstance(error, ConnectionResetError | BrokenPipeError):  # else nobody has heard of the engine
                self._look_back(reset=isinstance(error, ConnectionResetError))  # a pipe breaks where the engine's proper end came before
            self._read_rest()
        if self._error is None:
            self.end(ConnectionResetError(f"the connection was lost {self._stage()}: {error}"))
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    def _look_back(self, *, reset: bool) -> None:
        """Says of a connection that has ended whether its engine can have read any of the last request. Two things prove that it has not.

        A proper end that came before the request acknowledges nothing of it. A reset (which says nothing of what came) means that something
        was left unread: all of it, if the request is small enough to be read at once. It proves nothing where it may have answered what our
        kernel has sent once more, or a probe: then the engine may have read the request, and its machine know nothing of that any more.
        """
        if self._answered:
            return
        with suppress(OSError):
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
            if reset:
                silent, again = (int.from_bytes(info[each], sys.byteorder) for each in (_LAST_SENT, _SENT_AGAIN))
                probed = silent >= 1000 * self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                self.untouched = self._written - self._before <= _READ_AT_ONCE and not (again or probed)
                return
            acknowledged = int.from_bytes(info[_BYTES_ACKED], sys.byteorder)
            self.untouched = 0 < acknowledged <= self._before + 1  # the connection's own beginning counts as one

    def _stage(self) -> str:
        if self.parser.head is not None:
            return "in the middle of its answer"
        return "in the middle of its answer's head" if self._answered else "before its answer"

    def _read_rest(self) -> None:
        """What the engine said before it closed, where a failed write was noticed first."""
        with suppress(OSError):
            while self._error is None and not self.parser.done and (data := self._socket.recv(_READ, socket.MSG_DONTWAIT)):
                self.data_received(data)

    def _write(self, data: bytes) -> None:
        if self._error is not None or self._transport is None:
            raise self._error or ConnectionResetError("the connection has ended")
        self._written += len(data)
        self._transport.write(data)

    async def _send(self, body: AsyncIterable[bytes]) -> None:
        try:
            async for piece in body:
                self._write(piece)
                if self._room is not None:
                    await self._room
            self._upload = None
        except Exception as error:  # the client's as well: whoever waits for the answer is told of it
            self.end(error)

    async def _wait(self) -> None:
        """Returns when something has come. Raises: what the connection ended by."""
        if self._error is None:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None and not self.parser.done:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _give(self, receiver: Receiver) -> None:
        pieces = self.parser.pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if not receiver.take(piece) and not self._full:
            self._pause()

    def _pause(self) -> None:
        self._full = True
        if self._transport is not None and self._error is None:
            self._transport.pause_reading()
