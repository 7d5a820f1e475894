"""An engine's answers out of the bytes of its connection: httptools (llhttp, Node's parser) with what a proxy needs beside it.

httptools calls back for each field and each piece of a body; here that becomes what a connection asks for after each read: is the head
there, what came of the body, is it the end. What llhttp does not do is done here: answers to HEAD, whose fields speak of a body that does
not come; the end of answers that the connection's end ends; bounds, since it takes any number of bytes in; and which fields belong to the
connection alone. Fields stay bytes from here to the client: nothing is decoded that nobody reads.
Measured beside it, h11 takes nine times as long for a small answer, and twenty times for an event of a stream.
llhttp is set as lenient as engines are in use: lines that end without CR, values that go on in the next line.
"""

from __future__ import annotations

from typing import NamedTuple

import httptools

BOUND = 2**20  # bytes of a head, of trailers, or of whatever else comes without one byte of body

# They speak of one connection (RFC 9110, 7.6.1).
OF_ONE_CONNECTION = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade")
)
_NOTED = OF_ONE_CONNECTION | {b"content-length", b"date"}
_HARMLESS = frozenset((b"keep-alive", b"close", b"upgrade"))  # in Connection: they name no field that stands here

Fields = list[tuple[bytes, bytes]]


class BadAnswer(Exception):
    """The engine's answer cannot be passed on: it is no HTTP/1.1, over a bound, or coded for nobody who asked. It says which."""


class Head(NamedTuple):
    """An answer's head. fields: those that go on to the client; upgrade: what the connection becomes (101), or has to (426)."""

    status: int
    reason: bytes
    fields: Fields
    length: int | None  # bytes of the body; None: it ends by itself
    upgrade: bytes
    dated: bool = True  # it has a date

    def get(self, name: bytes) -> bytes:
        """The first field of that name, in small letters; empty: there is none."""
        return next((value for key, value in self.fields if key.lower() == name), b"")


class AnswerParser:
    """Reads one answer after the other. `pieces` holds what came of the body since they were last taken away."""

    __slots__ = (
        "_bodiless",
        "_fields",
        "_http",
        "_noted",
        "_reason",
        "_unseen",
        "_until_close",
        "_upgrades",
        "done",
        "excess",
        "head",
        "hints",
        "keeps",
        "on_body",
        "pieces",
        "raw",
        "trailers",
    )

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.on_body = self.pieces.append  # called by httptools, as all methods here that begin with on_
        self.excess = False  # something came that nobody asked for
        self._http = httptools.HttpResponseParser(self)
        self._http.set_dangerous_leniencies(lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True)
        self.expect(b"")
        self.done = True

    def expect(self, method: bytes, *, upgrades: bool = False) -> None:
        """The next bytes answer a request of that method. upgrades: it asks for another protocol."""
        self._upgrades = upgrades
        self._bodiless = method == b"HEAD"
        self.head: Head | None = None
        self.hints: list[Head] = []  # informational answers before it
        self.trailers: Fields = []
        self.done = False  # the answer has come to its end
        self.keeps = False  # the connection can have another request
        self.raw = False  # it speaks another protocol by now: all that comes is passed on
        self._fields: Fields = []
        self._noted: Fields = []
        self._reason = b""
        self._until_close = False
        self._unseen = 0

    def feed(self, data: bytes) -> None:
        """Raises: BadAnswer."""
        if self.raw:
            self.pieces.append(data)
            return
        try:
            self._http.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if rest := data[upgrade.args[0] :]:
                self.pieces.append(rest)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None
        except httptools.HttpParserError as error:
            if not self.done:
                raise BadAnswer(f"it cannot be parsed: {error}") from error
            self.excess = True
        if self.pieces or self.done:
            self._unseen = 0
            return
        self._unseen += len(data)
        if self._unseen > BOUND:
            raise BadAnswer(f"its head or its trailers have more than {BOUND} bytes, which is the bound")

    def feed_end(self) -> bool:
        """The connection ends without an error. Returns whether the answer is whole by that."""
        self.done = self.done or self._until_close
        return self.done

    def on_message_begin(self) -> None:
        if self.done:
            self.excess = True

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if b"\r" in value or b"\n" in value or b"\0" in value:
            raise BadAnswer(f"its field {name.decode('latin-1')} has a line end or a NUL inside")
        small = name.lower()
        if small in _NOTED:
            self._noted.append((small, value))
            if small in OF_ONE_CONNECTION:
                return
        (self._fields if self.head is None else self.trailers).append((name, value))

    def on_headers_complete(self) -> None:
        if self.done:
            return
        status = self._http.get_status_code()
        reason, noted = self._reason, self._noted
        fields, length, coding, upgrade, dated = _of_connection(self._fields, noted)
        self._fields, self._noted, self._reason = [], [], b""
        if status < 200 and status != 101:
            self.hints.append(Head(status, reason, fields, None, b""))
            return
        if coding not in (b"", b"chunked", b"identity"):
            raise BadAnswer(f"it is coded for its transfer as {coding.decode('latin-1')!r}, which nobody asked for")
        if status == 101:
            if not self._upgrades:
                raise BadAnswer("it changes to another protocol, which nobody asked for")
            self.raw = self._until_close = True
            self.head = Head(status, reason, fields, None, upgrade, dated)
            return
        if status == 204:
            fields = [field for field in fields if field[0].lower() != b"content-length"]
        self._bodiless = self._bodiless or status in (204, 304)
        self.keeps = self._http.should_keep_alive()
        self._until_close = length is None and coding != b"chunked" and not self._bodiless
        self.head = Head(status, reason, fields, 0 if self._bodiless else length, upgrade, dated)
        if self._bodiless:
            # Of an answer to HEAD llhttp waits for the body that its fields tell of: what it reads next would be taken for that.
            self.keeps = self.keeps and (status in (204, 304) or length == 0)
            self.done = True

    def on_message_complete(self) -> None:
        if self.head is not None and not self.raw:
            self.done = True


def _of_connection(fields: Fields, noted: Fields) -> tuple[Fields, int | None, bytes, bytes, bool]:
    """The fields that go on; the body's length, its coding, what the connection is to become, whether a date is there."""
    length: int | None = None
    dated = False
    coding = upgrade = b""
    for name, value in noted:
        if name == b"date":
            dated = True
        elif name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            coding += (b", " if coding else b"") + value.strip().lower()
        elif name == b"upgrade":
            upgrade = value
        elif name == b"connection":
            named = {word.strip().lower() for word in value.split(b",")} - _HARMLESS
            if named:
                fields = [field for field in fields if field[0].lower() not in named]
    return fields, length, coding, upgrade, dated
