"""Bodies that are read whole before anything is passed on, because they name the model. All others stream through unread.

What is read waits in memory, so there are two bounds: on each body, and on all that are being read at a time. A client that stops in the
middle is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from scaler.books.limits import MIB
from scaler.gateway.headers import MODEL
from scaler.gateway.refusal import Refusal
from scaler.gateway.target import Target

BODY_BYTES = 64 * MIB  # of one body
READING_BYTES = 512 * MIB  # of all bodies that are being read
_IDLE_SECONDS = 30.0  # a body of which nothing comes for this long is given up


class BodyReader:
    """Reads the bodies of one gateway. body_bytes: the bound on each."""

    def __init__(self, body_bytes: int = BODY_BYTES) -> None:
        self._bound = body_bytes
        self._reading = 0

    async def read(self, request: web.BaseRequest, target: Target) -> bytes | None:
        """The whole body; None: there is none, or it goes through unread. Raises: Refusal if it is over a bound, or does not come."""
        headers = request.headers
        if headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not request.body_exists:
            return None
        named = bool(headers.get(MODEL) or target.model)
        if not read_first(headers, request.content_length, self._bound, named):
            return None
        if (request.content_length or 0) > self._bound:
            raise self._too_large()
        return await self._whole(request)

    async def _whole(self, request: web.BaseRequest) -> bytes:
        content = request.content
        chunks: list[bytes] = []
        size = 0
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None if content.is_eof() else _IDLE_SECONDS) as timer:
                while chunk := await content.readany():
                    size += len(chunk)
                    self._reading += len(chunk)
                    if size > self._bound:
                        raise self._too_large()
                    if self._reading > READING_BYTES:
                        message = f"bodies of {READING_BYTES} bytes are being read, the gateway's bound; try again later"
                        raise Refusal(429, "reading_full", message, retry=True)
                    chunks.append(chunk)
                    if not content.is_eof():
                        timer.reschedule(loop.time() + _IDLE_SECONDS)
        except TimeoutError:
            message = f"nothing of the request's body came for {_IDLE_SECONDS:g} s, after {size} bytes"
            raise Refusal(408, "body_timeout", message) from None
        except web.RequestPayloadError as error:
            raise Refusal(400, "bad_body", f"the request's body could not be read: {error}") from error
        finally:
            self._reading -= size
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> Refusal:
        message = f"a body is read for its `model` up to {self._bound} bytes, and this one is larger; "
        message += f"name the model in the header {MODEL} or in the path /models/<name>/..., then it streams through"
        return Refusal(413, "body_too_large", message)


def read_first(headers: Mapping[str, str], length: int | None, bound: int, named: bool) -> bool:
    """Whether the body is read for its `model` before anything is passed on.

    length: the body's bytes if they are known; bound: how many are read; named: header or path name a model already.
    """
    if not named:
        return True
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    plain = headers.get("Content-Encoding", "identity").lower() == "identity"
    return length is not None and length <= bound and plain and (kind == "application/json" or kind.endswith("+json"))
