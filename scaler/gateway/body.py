"""Bodies that are read before anything is passed on, because they name the model. All others stream through unread.

JSON is read whole, and waits in memory; a form is read until its field `model` has passed, and waits in a file if that comes late (upload).
There are bounds on each body and on all that are being read at a time, on what compressed ones unpack to as well, and on what their
decoders keep. A client that stops in the middle is given up, and so is one that is slower than a kibibyte a second: what has come of it
counts among all that are being read, and would keep others out. One that waits to be told to send its body (`Expect: 100-continue`) is told
so when no bound speaks against it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from scaler.books.limits import MIB
from scaler.gateway import asked, coding
from scaler.gateway.form import FORM, BadForm, FormReader
from scaler.gateway.headers import MODEL
from scaler.gateway.refusal import Refusal
from scaler.gateway.upload import Upload

BODY_BYTES = 64 * MIB  # of one body, packed and unpacked
FORM_BYTES = 2048 * MIB  # of one form before its field `model`
READING_BYTES = 512 * MIB  # of all bodies that are being read, as far as they are in memory
_IDLE_SECONDS = 30.0  # a body of which nothing comes for this long is given up
_SLOWEST = 1024  # bytes a second, on the whole; beyond the seconds that a body may be idle
_AT_ONCE = MIB // 4  # bytes of JSON that are looked at in the event loop's own thread


class BodyReader:
    """Reads the bodies of one gateway. body_bytes: the bound on each."""

    def __init__(self, body_bytes: int = BODY_BYTES) -> None:
        self._bound = body_bytes
        self._reading = 0

    async def read(self, request: web.BaseRequest, upload: Upload, *, named: bool) -> None:
        """Reads what is needed of the body. named: header or path name a known model already.

        Raises: Refusal if it is over a bound, does not come, or cannot be read and nothing else names a model.
        """
        headers = request.headers
        if (coded := headers.get("Transfer-Encoding")) and coded.strip().lower() not in {"chunked", "identity"}:
            message = "a body whose Transfer-Encoding is more than chunked is not taken: Content-Encoding says how it is packed"
            raise Refusal(501, "unsupported_transfer_encoding", message)
        if not upload.streams or not read_first(headers, request.content_length, self._bound, named):
            return
        form = kind(headers) == FORM
        began = asyncio.get_running_loop().time()
        decoder = coding.decoder(headers.get("Content-Encoding", ""))
        length = request.content_length or 0
        if not form and length > self._bound:
            raise self._too_large()
        if not form and self._reading + length > READING_BYTES:
            raise _too_many()
        kept = self._count(decoder.memory) if decoder else 0
        try:
            if form:
                await self._form(request, upload, decoder, began)
            else:
                await self._json(request, upload, decoder, began)
        finally:
            self._reading -= kept

    async def _json(self, request: web.BaseRequest, upload: Upload, decoder: coding.Decoder | None, began: float) -> None:
        unpacked: list[bytes] = []
        size = counted = 0
        try:
            while chunk := await self._next(upload, began):
                if upload.read + len(chunk) > self._bound:
                    raise self._too_large()
                counted += self._count(len(chunk))
                await upload.keep(chunk, in_memory=True)
                for piece in decoder.pieces(chunk) if decoder else ():
                    size += len(piece)
                    if size > self._bound:
                        raise self._too_large("unpacks to more")
                    counted += self._count(len(piece))
                    unpacked.append(piece)
                    await asyncio.sleep(0)
            if decoder is not None:
                decoder.end()
            body = (b"".join(unpacked) if decoder else upload.whole()) or b""
            media = kind(request.headers)
            upload.asked, upload.fault = _look(body, media) if len(body) <= _AT_ONCE else await asyncio.to_thread(_look, body, media)
        finally:
            self._reading -= counted

    async def _form(self, request: web.BaseRequest, upload: Upload, decoder: coding.Decoder | None, began: float) -> None:
        unpacked = 0
        try:
            form = FormReader(request.headers.get("Content-Type", ""))
            found = False
            while not found and (chunk := await self._next(upload, began)):
                if upload.read + len(chunk) > FORM_BYTES:
                    raise self._too_large("has no field `model` up to there", FORM_BYTES)
                await upload.keep(chunk, in_memory=False)
                for piece in decoder.pieces(chunk) if decoder else (chunk,):
                    unpacked += len(piece)
                    if decoder and unpacked > self._bound:
                        raise self._too_large("unpacks to more")
                    if found := form.feed(piece):
                        break
                    await asyncio.sleep(0)
        except BadForm as error:
            raise Refusal(400, "bad_form", f"the request's body is not the form that its Content-Type says: {error}") from None
        upload.asked = asked.Asked(form.model or "")
        if not found:
            raise Refusal(400, "bad_form", "the request's form ends before its last boundary")

    async def _next(self, upload: Upload, began: float) -> bytes:
        """began: when the body began to be read, by the loop's clock."""
        if not upload.streams:
            return b""
        if upload.here:
            return await upload.more()
        now = asyncio.get_running_loop().time()
        idle, slow = now + _IDLE_SECONDS, began + _IDLE_SECONDS + upload.read / _SLOWEST
        try:
            async with asyncio.timeout_at(min(idle, slow)):
                return await upload.more()
        except TimeoutError:
            what = (
                f"nothing of the request's body came for {_IDLE_SECONDS:g} s"
                if idle <= slow
                else (f"the request's body comes more slowly than {_SLOWEST} bytes a second")
            )
            raise Refusal(408, "body_timeout", f"{what}, after {upload.read} bytes") from None

    def _count(self, more: int) -> int:
        """So many more bytes are in memory. Raises: Refusal, and counts none, if that is over the bound."""
        if self._reading + more > READING_BYTES:
            raise _too_many()
        self._reading += more
        return more

    def _too_large(self, how: str = "is larger", bound: int = 0) -> Refusal:
        message = f"a body is read for its `model` up to {bound or self._bound} bytes, and this one {how}; "
        message += f"name the model in the header {MODEL} or in the path /models/<name>/..., then it streams through"
        return Refusal(413, "body_too_large", message)


def kind(headers: Mapping[str, str]) -> str:
    """The body's media type, without its parameters."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def read_first(headers: Mapping[str, str], length: int | None, bound: int, named: bool) -> bool:
    """Whether the body is read for its `model` before anything is passed on.

    length: the body's bytes if they are known; bound: how many are read; named: header or path name a known model already.
    """
    if not named:
        return True
    plain = headers.get("Content-Encoding", "identity").strip().lower() == "identity"
    found = kind(headers)
    return length is not None and length <= bound and plain and (found == "application/json" or found.endswith("+json"))


def _look(body: bytes, media: str) -> tuple[asked.Asked | None, Refusal | None]:
    """What JSON asks for, or why it cannot be read."""
    found = asked.strictly(body)
    if found is not None or not body.strip():
        return found, None
    try:
        return asked.leniently(body), None
    except asked.BadJson as error:
        return None, _not_json(media, body, error)


def _not_json(media: str, body: bytes, error: asked.BadJson) -> Refusal | None:
    """The refusal of what is broken; None: it was never meant to be JSON. (curl -d says that it sends a form.)"""
    meant = not media or "json" in media or media in {"text/plain", "application/x-www-form-urlencoded"} or body.lstrip()[:1] == b"{"
    message = f"the request's body is broken JSON, so its `model` cannot be read: {error}"
    return Refusal(400, "bad_json", message) if meant else None


def _too_many() -> Refusal:
    message = f"bodies of {READING_BYTES} bytes are being read, the gateway's bound; try again later"
    return Refusal(429, "reading_full", message, retry=True)
