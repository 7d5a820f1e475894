"""A client's connection: aiohttp's own, but for heads that cannot be read and for clients that close their sending half.

A request that fails before a handler is called is answered in the API's JSON, like every other refusal, with a status that says what was
wrong. aiohttp's own answer shows a part of what it could not read, and logs it with a traceback: a header's value may be a credential, so
nothing of what was received is told to anybody.

A head that does not come to its end within HEAD_SECONDS of its first byte is answered with 408: whoever sends heads byte by byte holds a
connection for no longer. A client that is one too many (client_room) is answered with 503 as soon as it asks for something.

A client that sends its request and closes its sending half gets its answer (client_gone says how it is told from one that has left). Its
connection is closed when all requests that it has sent are answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import HttpVersion11, http_exceptions, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import ERROR, RequestHandler, RequestPayloadError, _ErrInfo

from scaler.gateway import metrics
from scaler.gateway.client_gone import ClientWatch
from scaler.gateway.client_room import ClientRoom
from scaler.gateway.refusal import Refusal

log = logging.getLogger(__name__)

LINE_BYTES = 16_384  # of a request line
HEADER_BYTES = 8_190  # of one header
HEADERS = 128
HEAD_SECONDS = 20.0  # from the first byte of a head to its last

_HEAD_LATE = Refusal(408, "head_timeout", f"the request's head did not come to its end within {HEAD_SECONDS:g} s of its first byte")
_TOO_MANY = Refusal(
    503,
    "too_many_connections",
    "as many clients are connected as the gateway has descriptors for, and all of them have requests under way; try again later",
    retry=True,
)
_UNREADABLE = ERROR._replace(version=HttpVersion11)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(RequestHandler):
    """One client's connection. watch: notices that the client has left; room: of all clients."""

    __slots__ = ("_at_end", "_head_timer", "_last_body", "_room", "_too_many", "_watch")

    def __init__(self, watch: ClientWatch, room: ClientRoom, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, max_line_size=LINE_BYTES, max_field_size=HEADER_BYTES, max_headers=HEADERS, **options)
        self._watch = watch
        self._room = room
        self._too_many = False
        self._head_timer: asyncio.TimerHandle | None = None  # a part of a head is here
        self._last_body: StreamReader | None = None  # of the request that came last
        self._at_end = False  # nothing comes from the client any more

    # --- what is asked by client_gone

    @property
    def written(self) -> int | None:
        """Bytes of an answer that were written; None: there is no request to be answered."""
        request = self._current_request
        return request.writer.output_size if request is not None else 0 if self._busy else None

    def probe(self) -> bool:
        """Sends what every client passes over before its answer, and one that has left refuses. False: it cannot be sent."""
        request = self._current_request
        if request is None or self.writing_paused:
            return True  # the end of an answer, or more of it, is on its way: that is asked enough
        if request.version < HttpVersion11 or request.writer.output_size or self.transport is None:
            return False
        self.transport.write(_CONTINUE)
        return True

    # --- what is asked by client_room

    def make_room(self) -> None:
        self.force_close()

    # --- asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._too_many = not self._room.enter(self)
        if self._too_many and self._room.is_over:
            self.force_close()
        elif self._too_many:
            self._await_head()  # nor may it stay without asking

    def data_received(self, data: bytes) -> None:
        if self._at_end:  # aiohttp looks through what it has kept
            data = b""
        super().data_received(data)
        if self._messages:
            self._room.asks(self)
            self._head_is_here()
            if self._too_many:
                self._messages.clear()
                self._put(_TOO_MANY)
                return
            message, body = self._messages[-1]
            unfinished = self._last_body is not None and not self._last_body.is_eof()
            if isinstance(message, RawRequestMessage):
                self._last_body = body
            elif unfinished and self._last_body is not None:
                # The body that is being read breaks off here: its reader is not told by aiohttp, and would wait for ever.
                self._messages.pop()
                self._last_body.set_exception(RequestPayloadError(_why(message.exc)[1]))
                self.close()
        elif data and self._head_timer is None and not self._busy and data.strip(b"\r\n"):
            self._await_head()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own is bool | None
        """Keeps the connection if there is something to be answered."""
        complete = self._last_body is None or self._last_body.is_eof()
        if not (self._busy and complete and self.transport is not None) or self._upgraded:
            return False
        if not self._at_end:
            self._at_end = True
            self._watch.suspect(self)
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._watch.lost(self)
        self._room.leave(self)
        self._head_is_here()
        super().connection_lost(exc)

    @property
    def _busy(self) -> bool:
        """Whether a request is here that has not been answered to its end."""
        return bool(self._messages) or (self._waiter is None and self._request_count > 0)

    def _await_head(self) -> None:
        self._head_timer = self._loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not (self._busy or self._close or self._force_close):
            self._put(_TOO_MANY if self._too_many else _HEAD_LATE)

    def _put(self, refusal: Refusal) -> None:
        """Answers with it, and ends the connection."""
        metrics.REFUSED.labels("", refusal.reason).inc()
        self._messages.append((_ErrInfo(status=refusal.status, exc=refusal, message=str(refusal)), EMPTY_PAYLOAD))
        self._request_count += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- aiohttp's

    async def _handle_request(
        self,
        request: web.BaseRequest,
        start_time: float | None,
        request_handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> tuple[web.StreamResponse, bool]:
        try:
            return await super()._handle_request(request, start_time, request_handler)
        finally:
            if not self._messages:
                self._room.rests(self)
                if self._at_end:
                    self.close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to a request that failed before its handler was called, or in it. Raises: ConnectionError if one has begun."""
        if isinstance(exc, Refusal):
            refusal = exc
        elif isinstance(exc, http_exceptions.HttpProcessingError):
            status, why = _why(exc)
            refusal = Refusal(status, "bad_request", why)
            log.info("a request could not be read: %s", why)
        else:
            refusal = Refusal(500, "internal_error", "the gateway failed at this request; its log says how")
            log.error("a request failed by a fault of the gateway", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun: its end cannot be an error")
        response = refusal.response
        response.force_close()
        return response


class ClientServer(web.Server):
    """Makes a connection of ours for each client."""

    def __init__(
        self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], watch: ClientWatch, room: ClientRoom, **options: Any
    ) -> None:
        super().__init__(handler, request_factory=self._request, **options)
        self._watch = watch
        self._room = room

    def __call__(self) -> RequestHandler:
        return ClientConnection(self._watch, self._room, self, loop=self._loop, **self._kwargs)

    def _request(
        self,
        message: RawRequestMessage,
        body: StreamReader,
        connection: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        if message is ERROR:  # it says HTTP/1.0, and so would the answer
            message = _UNREADABLE
        return web.BaseRequest(message, body, connection, writer, task, self._loop)


def _why(error: BaseException) -> tuple[int, str]:
    """Status and reason of a request that could not be read, with nothing of what was received."""
    if isinstance(error, http_exceptions.LineTooLong):
        if error.args[1] == LINE_BYTES:
            return 414, f"the request line is longer than {LINE_BYTES} bytes"
        return 431, f"a header of the request is longer than {HEADER_BYTES} bytes"
    text = error.message if isinstance(error, http_exceptions.HttpProcessingError) else ""
    if text == "Too many headers received":
        return 431, f"the request has more than {HEADERS} headers"
    return 400, f"the request is not what HTTP/1.1 allows: {_said(error, text)}"


def _said(error: BaseException, text: str) -> str:
    """What the parser says is wrong, as far as it says it in words of its own."""
    if isinstance(error, http_exceptions.InvalidHeader):
        return "a header has a name or a value that is none"
    if text.startswith(("Missing 'Host'", "Duplicate '", "Received HTTPS")):
        return text
    # The reason is a fixed text; what was found stands behind it, on lines of its own.
    reason, found, _ = text.removeprefix("Bad status line:\n  ").partition(":\n\n")
    if found:
        return reason
    return "its target is no path and no URL" if isinstance(error, http_exceptions.InvalidURLError) else "its head cannot be read"
