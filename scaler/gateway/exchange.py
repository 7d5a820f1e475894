"""One request's way to a replica and its answer's way back.

Head, body and answer go through as they are, less the headers that belong to one connection; an answer's chunks are passed on the moment
they come, and a slow client slows the engine down instead of filling memory. The answer's head is sent together with its first byte:
until then nothing was promised to the client, and a failure can be told with a status of its own.
Rejected: passing the head on at once (engines send it before the first token, the longest time for a replica to die in).

A client that opted into heartbeats has got its head already, as an event stream: then an answer that is no event stream, or ends early,
becomes an error event.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import NamedTuple

from aiohttp import web

from scaler.books.activation import TraceContext
from scaler.gateway.answer_parser import OF_ONE_CONNECTION, BadAnswer, Fields, Head
from scaler.gateway.connection import Connection
from scaler.gateway.cors import exposed
from scaler.gateway.dispatcher import Member
from scaler.gateway.forwarded import forwarded
from scaler.gateway.redirect import seen_from_outside
from scaler.gateway.refusal import Refusal
from scaler.gateway.reply import ClientStalled, Reply
from scaler.gateway.target import Target
from scaler.gateway.upgrade import asks_for_upgrade, splice
from scaler.gateway.upload import Upload
from scaler.gateway.upstream import NotReached, Upstream
from scaler.gateway.wait import NO_WAIT, Wait
from zerowake_shared.json_text import parsed

log = logging.getLogger(__name__)

# They speak of one connection, were answered by the gateway itself (Expect), or are made anew (Content-Length).
_NOT_PASSED = OF_ONE_CONNECTION | {b"content-length", b"expect", b"proxy-authorization", b"trailer"}
_HARMLESS = frozenset((b"keep-alive", b"close", b"upgrade"))  # in Connection: they name no field that could be passed on
_TRACE = frozenset((b"traceparent", b"tracestate"))  # W3C's trace context
_SAFE = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))  # RFC 9110, 9.2.1
_WITH_BODY = frozenset(("POST", "PUT", "PATCH"))
_SLICE = 2**18  # bytes of a held body written at once, so that a large one does not stop the loop
_ERROR_BYTES = 2**16  # of an engine's error, kept to be sent as an event


class ReplicaFailed(Exception):
    """The replica failed before the answer's first byte; `error` says how. reached: it may have begun to work on the request."""

    def __init__(self, error: Exception) -> None:
        self.reached = not isinstance(error, NotReached)
        super().__init__(f"{type(error).__name__}: {error}" if self.reached else str(error))
        self.error = error


class Answer(NamedTuple):
    """A replica's answer that has begun, on its connection. handed: when the replica got the request."""

    upstream: Upstream
    connection: Connection
    handed: float

    def close(self) -> None:
        self.upstream.give_back(self.connection)


class Exchange:
    """One request, and what of its answer the client has got.

    target: its path, as a replica gets it; upload: its body; now: the clock.
    """

    __slots__ = ("_events", "_now", "_request", "_target", "_upload", "_upload_error", "trace", "wait")

    def __init__(self, request: web.BaseRequest, target: Target, upload: Upload, now: Callable[[], float]) -> None:
        self._request = request
        self._target = target
        self._now = now
        self._upload = upload
        self._events: Reply | None = None
        self._upload_error: Exception | None = None
        self.wait: Wait | None = None  # since it had to wait
        self.trace: TraceContext | None = None  # what the replica is told of its trace; None: what the client says

    @property
    def harmless(self) -> bool:
        """Whether it does no harm to execute the request twice: by its method, or because its client says so (`Idempotency-Key`)."""
        return self._request.method in _SAFE or "Idempotency-Key" in self._request.headers

    async def beat(self) -> None:
        """Sends a comment to a waiting client; the first one begins an event stream."""
        if self._events is None:
            self._events = Reply(self._request)
            fields = [(b"Content-Type", b"text/event-stream; charset=utf-8"), (b"Cache-Control", b"no-cache")]
            if self.wait is not None:  # the rest is known when its head is gone
                fields += [*self.wait.told_first(), (b"Trailer", b", ".join(name for name, _ in self.wait.told_last(self._now())))]
            self._events.begin(Head(200, b"OK", fields, None, b""))
        if not self._events.take(b": waiting\n\n"):
            await self._events.emptied()

    async def ask(self, member: Member) -> Answer:
        """Sends the request to the replica; returns when its answer has begun. The answer is the caller's to close.

        Raises: ReplicaFailed; Refusal for an answer that cannot be passed on, or a body that the client sent wrongly; ConnectionError: the
        client has gone.
        """
        handed = self._now()
        if self.wait is not None:
            self.wait.handed = handed
        method = self._request.method.encode()
        upgrades = asks_for_upgrade(self._request)
        head = self._head(method, member.upstream.host, upgrades)
        body: AsyncIterable[bytes] | None = None
        if not self._upload.empty:
            whole = self._upload.whole()
            if whole is not None and len(whole) <= _SLICE:
                head += whole
            else:
                body = _Again(self._pieces if self._length() is not None else self._chunks)
        try:
            connection = await member.upstream.send(
                method, head, body, repeatable=not self._upload.streams, upgrades=upgrades, hint=self._hint
            )
        except BadAnswer as error:
            message = f"the engine of model {member.backend.model!r} answered with what cannot be passed on: {error}"
            raise Refusal(502, "bad_answer", message) from error
        except Exception as error:
            raise self._blame(error) from error
        self._upload.forget()
        return Answer(member.upstream, connection, handed)

    async def pass_on(self, answer: Answer, *, closes: bool) -> web.StreamResponse:
        """Sends the replica's answer to the client, to its end. closes: the connection is closed after it, and its head says so."""
        connection = answer.connection
        try:
            if self._events is not None:
                return await self._pass_events(self._events, connection)
            return await self._pass(answer, closes, NO_WAIT if self.wait is None else self.wait.told(self._now()))
        finally:
            if connection.uploads:
                await connection.stop_upload()

    async def refuse(self, refusal: Refusal) -> web.StreamResponse:
        """Answers with an error, as an event if an event stream has begun."""
        if self._events is None:
            return refusal.response if self.wait is None else refusal.after(self.wait.told_of_refusal(self._now()))
        return await self._fail_events(self._events, refusal.body)

    def _head(self, method: bytes, host: bytes, upgrades: bool) -> bytes:
        """The head as the replica gets it: the client's bytes, less what belongs to its connection. host: for clients that name none."""
        request = self._request
        headers = request.headers
        fields = [field for field in request.raw_headers if field[0].lower() not in _NOT_PASSED]
        if "Connection" in headers:
            named = {word.strip().lower() for value in headers.getall("Connection") for word in value.encode().split(b",")} - _HARMLESS
            if named:
                fields = [field for field in fields if field[0].lower() not in named]
        if self._events is not None:  # our head said that the answer is not encoded
            fields = [field for field in fields if field[0].lower() != b"accept-encoding"]
        if self.trace is not None:
            fields = [field for field in fields if field[0].lower() not in _TRACE]
            fields += [(name.encode(), value.encode()) for name, value in self.trace._asdict().items() if value]
        fields = forwarded(fields, headers, _peer(request), self._target.prefix)
        lines = [b"%b %b HTTP/1.1" % (method, self._target.path.encode("utf-8", "surrogateescape"))]
        if "Host" not in headers:
            lines.append(b"Host: " + host)
        lines += [b": ".join(field) for field in fields]
        if upgrades:
            lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
        length = self._length()
        if length is not None:
            lines.append(b"Content-Length: %d" % length)
        elif not self._upload.empty:
            lines.append(b"Transfer-Encoding: chunked")
        lines.append(b"\r\n")
        return b"\r\n".join(lines)

    def _length(self) -> int | None:
        """Bytes of the body that the replica gets; None: there is none, or nobody knows."""
        if self._upload.streams:
            return self._request.content_length
        if not self._upload.empty:
            return self._upload.read
        return 0 if self._request.method in _WITH_BODY or "Content-Length" in self._request.headers else None

    def _hint(self, head: Head) -> None:
        if self._events is None:
            Reply(self._request).hint(head)

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._upload.pieces():
                yield piece
        except (Refusal, ConnectionError) as error:
            self._upload_error = error
            raise

    async def _chunks(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces():
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
        yield b"0\r\n\r\n"

    def _blame(self, error: Exception) -> Exception:
        """Whose fault it was that a request got no answer."""
        if self._upload_error is None:
            return ReplicaFailed(error) if isinstance(error, OSError) else error
        return self._upload_error

    async def _pass(self, answer: Answer, closes: bool, told: Fields) -> web.StreamResponse:
        connection = answer.connection
        head = connection.head
        target = self._target
        if target.prefix or 300 <= head.status < 400 or head.status == 201:
            endpoint = answer.upstream.endpoint
            host = self._request.headers.get("Host", "")
            head = head._replace(fields=seen_from_outside(head.fields, target, host, (endpoint.host, endpoint.port)))
        if "Origin" in self._request.headers:
            told = told + exposed(head, told)
        reply = Reply(self._request, closes=closes)
        reply.begin(head, told)
        try:
            if head.status == 101:
                await splice(self._request, connection, reply)
            elif (body := connection.whole()) is not None:
                reply.finish_whole(body, connection.trailers)
            else:
                await connection.pass_on(reply)
                reply.finish(connection.trailers)
            await reply.taken()
        except ClientStalled:
            raise
        except (BadAnswer, OSError) as error:
            if self._request.transport is None:
                raise ConnectionResetError("the client has gone") from error
            fields = {"path": self._target.path.partition("?")[0], "error": f"{type(error).__name__}: {error}"}
            log.warning("a replica died in the middle of an answer; the client's connection is closed", extra={"fields": fields})
            reply.cut()
        return reply

    async def _pass_events(self, events: Reply, connection: Connection) -> web.StreamResponse:
        head = connection.head
        passes = head.status == 200 and head.get(b"content-type").partition(b";")[0].strip().lower() == b"text/event-stream"
        trailers = [] if self.wait is None else self.wait.told_last(self._now())
        told = _Told()
        try:
            await connection.pass_on(events if passes else told)
        except ClientStalled:
            raise
        except (BadAnswer, OSError) as error:
            if self._request.transport is None:
                raise ConnectionResetError("the client has gone") from error
            message = f"the replica died in the middle of its answer ({type(error).__name__}: {error})"
            return await self._fail_events(events, Refusal(502, "replica_failed", message).body)
        if not passes:
            return await self._fail_events(events, _as_error(head.status, bytes(told.text)))
        events.finish(trailers)
        return events

    async def _fail_events(self, events: Reply, error: bytes) -> web.StreamResponse:
        # The empty line ends an event that may have been cut off. Line ends inside the JSON would end ours: there are none outside strings.
        events.take(b"\n\ndata: " + json.dumps(json.loads(error)).encode() + b"\n\n")
        events.finish()
        return events


def _peer(request: web.BaseRequest) -> str:
    peer = request.protocol.peername
    return peer[0] if isinstance(peer, tuple) else ""


class _Told:
    """Takes what an engine says instead of an event stream."""

    def __init__(self) -> None:
        self.text = bytearray()

    def take(self, piece: bytes) -> bool:
        if len(self.text) < _ERROR_BYTES:
            self.text += piece
        return True

    async def emptied(self) -> None:
        """It always takes more."""

    def cut(self) -> None:
        """It never lets anybody wait."""


class _Again:
    """Pieces of a body, from its beginning as often as they are asked for."""

    def __init__(self, pieces: Callable[[], AsyncIterator[bytes]]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces()


def _as_error(status: int, body: bytes) -> bytes:
    """An engine's error in OpenAI's shape: its own JSON if it is that already."""
    try:
        told = parsed(body)
        if isinstance(told, dict) and "error" in told:
            return body
    except ValueError:
        pass
    text = body.decode("utf-8", "replace").strip() or "no text"
    return Refusal(status, "engine_error", f"the engine answered with status {status}: {text}").body
