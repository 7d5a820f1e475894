"""Content codings of bodies that have to be read: what is compressed is unpacked to be looked at, and passed on as it came.

A few kilobytes can unpack to gigabytes, so a decoder gives small pieces, and whoever takes them counts. So it has to be one that can be
told how much to give at once: `zlib`, Brotli's own package from 1.2 on, and what Python 3.14 has for Zstandard (`backports.zstd` before).
What a decoder keeps of what it has unpacked, its window, is a thing of the sender's choice, and is bounded and counted as well: for zstd to
what RFC 9659 allows to this coding. Brotli and Zstandard are there if their packages are installed (the extra `codings`); without them, and
of other codings, bodies go through where the model is named outside of them.
Rejected: the package `zstandard`, which unpacks all that it is given at once, however much that is.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from scaler.gateway.refusal import Refusal

_PIECE = 2**18  # bytes unpacked at once; Brotli may give twice as many
_GZIP = 16 + zlib.MAX_WBITS
_ZSTD_WINDOW_BITS = 23  # 8 MiB, by RFC 9659
_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


class _Stream(Protocol):
    """One packed stream of a body: as of `compression.zstd`'s decompressor."""

    @property
    def eof(self) -> bool:
        """It has ended."""

    @property
    def unused_data(self) -> bytes:
        """What follows its end."""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Of what it was given so far the next bytes; none: it has no more."""


class _Zlib:
    """gzip, or deflate: zlib's format, of which some send what is inside of it alone."""

    def __init__(self, gzip: bool) -> None:
        self._zlib = zlib.decompressobj(_GZIP) if gzip else None

    @property
    def eof(self) -> bool:
        return self._zlib is not None and self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data if self._zlib else b""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        if self._zlib is None:
            whole = data[0] & 0x0F == 8 and (len(data) == 1 or int.from_bytes(data[:2], "big") % 31 == 0)
            self._zlib = zlib.decompressobj(zlib.MAX_WBITS if whole else -zlib.MAX_WBITS)
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


class _Brotli:
    """What follows its end is an error of its own."""

    unused_data = b""

    def __init__(self, package: Any) -> None:
        self._brotli = package.Decompressor()

    @property
    def eof(self) -> bool:
        return bool(self._brotli.is_finished())

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        piece: bytes = self._brotli.process(data, output_buffer_limit=max_length)
        return piece


class _Coding:
    """How bodies of one coding are unpacked.

    error: what a stream raises of bytes that are none. members: one stream may follow another. memory: bytes that a stream keeps at most.
    """

    def __init__(self, begin: Callable[[], _Stream], error: type[Exception], memory: int, *, members: bool) -> None:
        self.begin = begin
        self.error = error
        self.memory = memory
        self.members = members


def _known() -> Iterator[tuple[str, _Coding]]:
    yield "gzip", _Coding(lambda: _Zlib(gzip=True), zlib.error, 2**16, members=True)
    yield "deflate", _Coding(lambda: _Zlib(gzip=False), zlib.error, 2**16, members=False)
    if brotli := _installed("brotli"):
        yield "br", _Coding(lambda: _Brotli(brotli), brotli.error, 2**24, members=False)
    if zstd := _installed(_ZSTD):
        options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_BITS}
        yield "zstd", _Coding(lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError, 2**_ZSTD_WINDOW_BITS, members=True)


def _installed(package: str) -> Any:
    """None: it is not."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        return None


_CODINGS = dict(_known())


class Decoder:
    """Unpacks one body. memory: bytes that it keeps at most, beside what it has given."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._coding = _CODINGS[name]
        self._stream: _Stream | None = None
        self.memory = self._coding.memory

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What `data`, the next bytes of the body, unpacks to. Raises: Refusal if it is not what it is called."""
        try:
            while data:
                if self._stream is None or (self._stream.eof and self._coding.members):
                    self._stream = self._coding.begin()
                elif self._stream.eof:
                    raise self._bad("something follows its end")
                given, data = data, b""
                while piece := self._stream.decompress(given, _PIECE):
                    yield piece
                    given = b""
                    if self._stream.eof:
                        break
                if self._stream.eof:
                    data = self._stream.unused_data
        except self._coding.error as error:
            raise self._bad(str(error)) from None

    def end(self) -> None:
        """The body has ended. Raises: Refusal if what was packed has not."""
        if self._stream is None or not self._stream.eof:
            raise self._bad("it ends too early")

    def _bad(self, why: str) -> Refusal:
        return Refusal(400, "bad_encoding", f"the request's body is not what its Content-Encoding, {self._name}, says: {why}")


def decoder(content_encoding: str) -> Decoder | None:
    """What unpacks a body of that `Content-Encoding`; None: nothing is to be unpacked. Raises: Refusal if it cannot be unpacked here."""
    if not content_encoding:
        return None
    codings = [each for part in content_encoding.split(",") if (each := part.strip().lower()) not in {"", "identity"}]
    if not codings:
        return None
    if len(codings) == 1 and (coding := codings[0].removeprefix("x-")) in _CODINGS:
        return Decoder(coding)
    message = (
        f"a body of Content-Encoding {', '.join(codings)[:100]!r} is not unpacked to look for its `model`: send it as"
        f" {' or '.join(_CODINGS)}, or as it is, or name the model outside the body: then it is passed on as it comes"
    )
    raise Refusal(415, "unsupported_encoding", message, headers={"Accept-Encoding": ", ".join(_CODINGS)})
