"""Content codings of bodies that have to be read: what is compressed is unpacked to be looked at, and passed on as it came.

A few kilobytes can unpack to gigabytes, so a decoder gives small pieces, and whoever takes them counts. Only what Python's zlib has is
unpacked; other codings go through where the model is named outside the body. Pure.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from scaler.gateway.refusal import Refusal

READ = ("gzip", "deflate")
_PIECE = 2**18  # bytes unpacked at once
_GZIP = 16 + zlib.MAX_WBITS


class Decoder:
    """Unpacks one body."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._zlib = zlib.decompressobj(_GZIP) if coding == "gzip" else None

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What `data`, the next bytes of the body, unpacks to. Raises: Refusal if it is not what it is called."""
        try:
            while data:
                if self._zlib is None:
                    self._zlib = _deflate(data)
                while piece := self._zlib.decompress(data, _PIECE):
                    yield piece
                    data = self._zlib.unconsumed_tail
                data = self._zlib.unused_data if self._zlib.eof else b""
                if data and self._coding != "gzip":
                    raise self._bad("something follows its end")
                if data:  # one gzip member may follow another
                    self._zlib = zlib.decompressobj(_GZIP)
        except zlib.error as error:
            raise self._bad(str(error)) from None

    def end(self) -> None:
        """The body has ended. Raises: Refusal if what was packed has not."""
        if self._zlib is None or not self._zlib.eof:
            raise self._bad("it ends too early")

    def _bad(self, why: str) -> Refusal:
        return Refusal(400, "bad_encoding", f"the request's body is not what its Content-Encoding, {self._coding}, says: {why}")


def decoder(content_encoding: str) -> Decoder | None:
    """What unpacks a body of that `Content-Encoding`; None: nothing is to be unpacked. Raises: Refusal if it cannot be unpacked here."""
    if not content_encoding:
        return None
    codings = [each for part in content_encoding.split(",") if (each := part.strip().lower()) not in {"", "identity"}]
    if not codings:
        return None
    if len(codings) == 1 and (coding := codings[0].removeprefix("x-")) in READ:
        return Decoder(coding)
    message = (
        f"a body of Content-Encoding {', '.join(codings)[:100]!r} is not unpacked to look for its `model`: send it as {' or '.join(READ)},"
        " or as it is, or name the model outside the body: then it is passed on as it comes"
    )
    raise Refusal(415, "unsupported_encoding", message, headers={"Accept-Encoding": ", ".join(READ)})


def _deflate(data: bytes) -> zlib._Decompress:
    """`deflate` means zlib's format, and some send what is inside of it alone."""
    whole = data[0] & 0x0F == 8 and (len(data) == 1 or int.from_bytes(data[:2], "big") % 31 == 0)
    return zlib.decompressobj(zlib.MAX_WBITS if whole else -zlib.MAX_WBITS)
