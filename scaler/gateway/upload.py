"""A request's body on its way: what of it had to be read ahead, and what still comes from its client.

What was read ahead to find the model waits in memory, and from a mebibyte on in a file without a name, so that a large form costs the disk
and not the memory. The rest stays with the client until a replica takes it. As long as nothing of the rest was taken, all of it can be
sent again.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from typing import IO

from aiohttp import web

from scaler.gateway.asked import Asked
from scaler.gateway.refusal import Refusal

MEMORY_BYTES = 2**20
_SLICE = 2**18  # bytes handed on at once, so that a large body does not stop the loop


class Upload:
    """One request's body.

    asked: what it asks for; None: it was not read for that. fault: why it could not be read; a matter only if nothing else names the model.
    """

    __slots__ = ("_chunks", "_expects", "_file", "_request", "_rest", "_taken", "asked", "fault", "read", "size")

    def __init__(self, request: web.BaseRequest) -> None:
        self.asked: Asked | None = None
        self.fault: Refusal | None = None
        self.read = 0  # bytes read ahead
        self.size = 0  # of those, the bytes that wait in memory
        self._request = request
        self._rest = request.body_exists
        self._expects = self._rest and request.headers.get("Expect", "").lower() == "100-continue" and request.version >= (1, 1)
        self._taken = False
        self._chunks: list[bytes] = []
        self._file: IO[bytes] | None = None

    @property
    def empty(self) -> bool:
        """There is no body."""
        return not (self._rest or self.read)

    @property
    def streams(self) -> bool:
        """Whether some of it still comes from the client."""
        return self._rest

    @property
    def repeatable(self) -> bool:
        """Whether all of it can be sent again."""
        return not self._taken

    @property
    def here(self) -> bool:
        """Whether the rest of it has come already."""
        return self._request.content.is_eof()

    async def more(self) -> bytes:
        """The next bytes from the client; none: that was all. Raises: Refusal, ConnectionError."""
        self.go_on()
        try:
            chunk = await self._request.content.readany()
        except web.RequestPayloadError as error:
            raise Refusal(400, "bad_body", f"the request's body could not be read: {error}") from error
        # What is read may be the last of it; a handler is called for a body that is here already in most cases.
        if not chunk or self._request.content.at_eof():
            self._rest = False
        return chunk

    def go_on(self) -> None:
        """Tells a client that waits for it to send its body (`Expect: 100-continue`): nothing speaks against it any more."""
        if self._expects and self._request.transport is not None and not self._request.content.total_bytes:
            self._request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._expects = False

    @property
    def waits(self) -> bool:
        """Whether its client waits to be told to send it. It may send it all the same, so an answer ends the connection."""
        return self._expects

    async def keep(self, chunk: bytes, *, in_memory: bool) -> None:
        """Keeps what was read ahead. Raises: Refusal if there is no room for it."""
        self.read += len(chunk)
        self.size += len(chunk)
        self._chunks.append(chunk)
        if not in_memory and self.size >= MEMORY_BYTES:
            pieces, self._chunks, self.size = self._chunks, [], 0
            try:
                await asyncio.to_thread(self._spill, pieces)
            except OSError as error:
                message = f"the form is kept in a file until its field `model` has come, and could not be: {error.strerror or error}"
                raise Refusal(507, "no_room", message, retry=True) from error

    def whole(self) -> bytes | None:
        """All of it, where it is in memory; else it comes in pieces."""
        if self._rest or self._file is not None:
            return None
        if len(self._chunks) > 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0] if self._chunks else b""

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it, from its beginning. Raises: Refusal, ConnectionError."""
        file, chunks = self._file, self._chunks
        at = 0
        while file is not None and (chunk := await asyncio.to_thread(_read, file, at)):
            at += len(chunk)
            yield chunk
        for chunk in chunks:
            for start in range(0, len(chunk), _SLICE):
                yield chunk[start : start + _SLICE]
        while self._rest:
            self._taken = True
            if chunk := await self.more():
                yield chunk

    def forget(self) -> None:
        """A replica answers: what was kept is of no more use. One that answers early still gets the rest of what it was sent."""
        self._taken = True
        self._chunks = []
        self.size = 0

    def close(self) -> None:
        """Nobody is sent it any more."""
        self.forget()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self, pieces: list[bytes]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="zerowake-form-", buffering=0)  # noqa: SIM115
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[self._file.write(view) :]


def _read(file: IO[bytes], at: int) -> bytes:
    file.seek(at)
    return file.read(_SLICE)
