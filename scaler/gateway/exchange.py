"""One request's way to a replica and its answer's way back.

Head, body and answer go through as they are, less the headers that belong to one connection; an answer's chunks are passed on the moment
they come, and a slow client slows the engine down instead of filling memory. The answer's head is sent together with its first byte:
until then nothing was promised to the client, so a replica that dies with the head out but no byte behind it is still replaced unnoticed.
Rejected: passing the head on at once (engines send it before the first token, the longest time for a replica to die in).

A client that opted into heartbeats has got its head already, as an event stream: then an answer that is no event stream, or ends early,
becomes an error event.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from scaler.gateway.dispatcher import Member
from scaler.gateway.refusal import Refusal
from scaler.gateway.upload import Upload

log = logging.getLogger(__name__)

# They speak of one connection (RFC 9110, 7.6.1), or were answered by the gateway itself (Expect).
_HOP_BY_HOP = (
    "Connection",
    "Expect",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
)
_SLICE = 2**18  # bytes of a held body written at once, so that a large one does not stop the loop
_ERROR_BYTES = 2**16  # of an engine's error, kept to be sent as an event


class ReplicaFailed(Exception):
    """The replica failed before the answer's first byte; `error` says how."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


class _Response(web.StreamResponse):
    """An answer whose head waits for the first chunk."""

    _send_headers_immediately = False  # aiohttp writes both in one packet then


class Answer(NamedTuple):
    """A replica's answer, of which the first bytes are here (none: it has no body). handed: when the replica got the request."""

    response: aiohttp.ClientResponse
    first: bytes
    handed: float

    def close(self) -> None:
        self.response.close()


class Exchange:
    """One request, and what of its answer the client has got.

    path: the target that a replica gets; upload: its body; now: the clock.
    """

    __slots__ = ("_events", "_now", "_path", "_request", "_upload", "_upload_error")

    def __init__(self, request: web.BaseRequest, path: str, upload: Upload, now: Callable[[], float]) -> None:
        self._request = request
        self._path = path
        self._now = now
        self._upload = upload
        self._events: web.StreamResponse | None = None
        self._upload_error: Exception | None = None

    async def beat(self) -> None:
        """Sends a comment to a waiting client; the first one begins an event stream."""
        if self._events is None:
            headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            self._events = _Response(status=200, headers=headers)
            await self._events.prepare(self._request)
        await self._events.write(b": waiting\n\n")

    async def ask(self, member: Member) -> Answer:
        """Sends the request to the replica; returns when its answer has begun. The answer is the caller's to close.

        Raises: ReplicaFailed; Refusal for a body that the client sent wrongly; ConnectionError: the client has gone.
        """
        handed = self._now()
        try:
            response, first = await member.upstream.send(self._request.method, self._path, self._head(), self._data())
        except (aiohttp.ClientError, OSError) as error:
            raise self._blame(error) from error
        self._upload.forget()
        return Answer(response, first, handed)

    async def pass_on(self, answer: Answer, *, closes: bool) -> web.StreamResponse:
        """Sends the replica's answer to the client, to its end. closes: the connection is closed after it, and its head says so."""
        if self._events is not None:
            return await self._pass_events(self._events, answer.response, answer.first)
        return await self._pass(answer.response, answer.first, closes)

    async def refuse(self, refusal: Refusal) -> web.StreamResponse:
        """Answers with an error, as an event if an event stream has begun."""
        if self._events is None:
            return refusal.response
        return await self._fail_events(self._events, refusal.body)

    def _head(self) -> CIMultiDict[str]:
        headers = _end_to_end(self._request.headers)
        if self._events is not None:
            headers.popall("Accept-Encoding", None)  # our head said that the answer is not encoded
        return headers

    def _data(self) -> bytes | AsyncIterator[bytes] | None:
        if self._upload.empty:
            return None
        whole = self._upload.whole()
        return whole if whole is not None and len(whole) <= _SLICE else self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._upload.pieces():
                yield chunk
        except (Refusal, ConnectionError, aiohttp.ClientError) as error:
            self._upload_error = error
            raise

    def _blame(self, error: Exception) -> Exception:
        """Whose fault it was that a request got no answer."""
        if self._upload_error is None:
            return ReplicaFailed(error)
        if isinstance(self._upload_error, ConnectionError | Refusal):
            return self._upload_error
        return Refusal(400, "bad_body", f"the request's body could not be read: {self._upload_error}")

    async def _pass(self, answer: aiohttp.ClientResponse, chunk: bytes, closes: bool) -> web.StreamResponse:
        response = _Response(status=answer.status, reason=answer.reason, headers=_end_to_end(answer.headers))
        if closes:
            response.force_close()
        await response.prepare(self._request)
        while chunk:
            await response.write(chunk)
            try:
                chunk = await answer.content.readany()
            except (aiohttp.ClientError, OSError) as error:
                self._cut(answer, error)
                return response
        await response.write_eof()
        return response

    async def _pass_events(self, response: web.StreamResponse, answer: aiohttp.ClientResponse, chunk: bytes) -> web.StreamResponse:
        passes = answer.status == 200 and answer.content_type == "text/event-stream"
        error = bytearray()
        try:
            while chunk:
                if passes:
                    await response.write(chunk)
                elif len(error) < _ERROR_BYTES:
                    error += chunk
                try:
                    chunk = await answer.content.readany()
                except (aiohttp.ClientError, OSError) as broken:
                    raise ReplicaFailed(broken) from broken
        except ReplicaFailed as broken:
            message = f"the replica died in the middle of its answer ({broken})"
            return await self._fail_events(response, Refusal(502, "replica_failed", message).body)
        if not passes:
            return await self._fail_events(response, _as_error(answer.status, bytes(error)))
        await response.write_eof()
        return response

    async def _fail_events(self, response: web.StreamResponse, error: bytes) -> web.StreamResponse:
        # The empty line ends an event that may have been cut off. Line ends inside the JSON would end ours: there are none outside strings.
        await response.write(b"\n\ndata: " + json.dumps(json.loads(error)).encode() + b"\n\n")
        await response.write_eof()
        return response

    def _cut(self, answer: aiohttp.ClientResponse, error: Exception) -> None:
        """Closes the client's connection without the answer's proper end: that is how it learns that the answer is not whole."""
        fields = {"url": str(answer.url), "error": f"{type(error).__name__}: {error}"}
        log.warning("a replica died in the middle of an answer; the client's connection is closed", extra={"fields": fields})
        if self._request.transport is not None:
            self._request.transport.close()


def _end_to_end(headers: CIMultiDict[str] | CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """A copy without the headers of the connection, those that `Connection` names included."""
    kept = CIMultiDict(headers)
    for name in kept.getall("Connection", ()):
        for token in name.split(","):
            kept.popall(token.strip(), None)
    for name in _HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def _as_error(status: int, body: bytes) -> bytes:
    """An engine's error in OpenAI's shape: its own JSON if it is that already."""
    try:
        told = json.loads(body)
        if isinstance(told, dict) and "error" in told:
            return body
    except ValueError:
        pass
    text = body.decode("utf-8", "replace").strip() or "no text"
    return Refusal(status, "engine_error", f"the engine answered with status {status}: {text}").body
