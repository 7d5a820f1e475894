"""What a request's body asks for: `model` and `stream`, the two members of OpenAI's API that matter here.

msgspec reads nearly every JSON body, fast and strictly. What it refuses is scanned, since engines take more than the standard has, and it
is theirs to decide: Python's take NaN, Infinity, a byte order mark and UTF-16; some take bytes that are no UTF-8, or half of a surrogate
pair; and none says how deep a body may nest. The scan builds nothing and keeps its own stack, a byte for each level. It refuses only what
is no JSON by anybody's rules, and says where. Rejected: Python's `json` as the second reader (it recurses, and stops at a thousand
levels), and looking for `"model"` by a pattern, which finds it in a prompt. Pure.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import msgspec

from scaler.gateway.refusal import Refusal

_S = rb"[ \t\n\r]*+"
_TEXT = rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+'
_BEGUN = re.compile(_TEXT)
_TOKEN = re.compile(rb"[ \t\n\r]*+(?:(" + _TEXT + rb'")|([\[\]{},:])|([^ \t\n\r\[\]{},:"\x00-\x1f]++))')
_DIGITS = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
_SCALAR = rb"(?:" + _TEXT + rb'"|' + _DIGITS + rb"|true|false|null|NaN|-?Infinity)"
# Whole runs of what is most of a large body are passed at once.
_ITEMS = re.compile(rb"(?:" + _S + _SCALAR + _S + rb",)*+")
_MEMBERS = re.compile(rb"(?:" + _S + _TEXT + rb'"' + _S + rb":" + _S + _SCALAR + _S + rb",)*+")
_SPACE = re.compile(_S)
_NUMBER = re.compile(_DIGITS)
_WORDS = {b"true": "boolean", b"false": "boolean", b"null": "null", b"NaN": "number", b"Infinity": "number", b"-Infinity": "number"}
_OPENED = {b"{": "object", b"[": "array"}
_CLOSED = {ord("{"): b"}", ord("["): b"]"}


class Asked(NamedTuple):
    """What a body asks for. model: empty: it names none; kind: what stands in its place where that is no string, in JSON's words."""

    model: str = ""
    stream: bool = False
    kind: str = "string"


class BadJson(ValueError):
    """A body is no JSON object; the message says why, and where."""

    def __init__(self, what: str, body: bytes, at: int) -> None:
        line = body.count(b"\n", 0, at) + 1
        column = at - body.rfind(b"\n", 0, at)
        super().__init__(f"{what} at line {line}, column {column} (byte {at})")


class _Members(msgspec.Struct):
    """Whatever else is in a body is skipped, not built."""

    model: object = None
    stream: object = None


_decode = msgspec.json.Decoder(_Members).decode
_NAMES = {str: "string", type(None): "null", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}


def strictly(body: bytes) -> Asked | None:
    """What a JSON object asks for, where it is one by the strictest rules; None: look closer."""
    try:
        found = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    model = found.model
    stream = found.stream is True
    return Asked(model, stream) if isinstance(model, str) else Asked("", stream, _NAMES[type(model)])


def leniently(body: bytes) -> Asked:
    """What anything asks for that some engine takes for a JSON object. Raises: BadJson."""
    encoding = json.detect_encoding(body)
    if encoding == "utf-8-sig":
        body = body[3:]
    elif encoding != "utf-8":
        try:
            body = body.decode(encoding).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise BadJson(f"it begins like {encoding} and is none", body, error.start) from None
    return _Scan(body).run()


class _Scan:
    """One walk over a body's tokens."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0
        self._open = bytearray()

    def run(self) -> Asked:
        found = Asked(kind="null")
        kind, _ = self._value()
        if kind != "object":
            raise BadJson(f"it is a JSON {kind}, not an object,", self._body, 0)
        key = b""
        first = True  # nothing stands yet in what was opened last
        while self._open:
            inside = self._open[-1]
            if self._closes(_CLOSED[inside], first):
                first = False
                continue
            if (run := self._runs(inside)) is not None and (passed := run.match(self._body, self._at)):
                self._at = passed.end()
            if inside == ord("{"):
                name = self._key()
                key = name if len(self._open) == 1 else b""
            deep = len(self._open)
            kind, text = self._value()
            first = len(self._open) > deep
            if deep == 1:
                found = _taken(found, _string(key), kind, text)
        if (rest := self._skip_space()) < len(self._body):
            raise BadJson("something follows the end of the object", self._body, rest)
        return found

    def _runs(self, inside: int) -> re.Pattern[bytes] | None:
        if inside == ord("["):
            return _ITEMS
        return _MEMBERS if len(self._open) > 1 else None

    def _closes(self, end: bytes, first: bool) -> bool:
        """Whether what is open ends here; else the next member begins here. Raises: BadJson."""
        at = self._skip_space()
        found = self._body[at : at + 1]
        if found == end:
            self._at = at + 1
            self._open.pop()
            return True
        if first:
            return False
        if found != b",":
            raise self._unexpected(at, f"',' or '{end.decode()}'")
        self._at = at + 1
        if self._body[(then := self._skip_space()) : then + 1] == end:
            raise self._unexpected(then, "something after the ','")
        return False

    def _key(self) -> bytes:
        match = _TOKEN.match(self._body, self._at)
        if match is None or match[1] is None:
            raise self._unexpected(self._skip_space(), "a member's name in double quotes")
        self._at = match.end()
        at = self._skip_space()
        if self._body[at : at + 1] != b":":
            raise self._unexpected(at, "':'")
        self._at = at + 1
        return match[1]

    def _value(self) -> tuple[str, bytes]:
        """The kind of the next value and its text; an object or array is opened, not read. Raises: BadJson."""
        match = _TOKEN.match(self._body, self._at)
        if match is None:
            raise self._unexpected(self._skip_space(), "a value")
        text: bytes = match[match.lastindex or 0]
        kind = "string"
        if match.lastindex == 2:
            kind = _OPENED.get(text, "")
        elif match.lastindex == 3:
            kind = _WORDS.get(text) or ("number" if _NUMBER.fullmatch(text) else "")
        if not kind:
            raise self._unexpected(match.start(match.lastindex or 0), "a value")
        if match.lastindex == 2:
            self._open += text
        self._at = match.end()
        return kind, text

    def _skip_space(self) -> int:
        match = _SPACE.match(self._body, self._at)
        return match.end() if match else self._at

    def _unexpected(self, at: int, wanted: str) -> BadJson:
        if at >= len(self._body):
            return BadJson(f"it ends where {wanted} should be,", self._body, at)
        match = _BEGUN.match(self._body, at)
        if match and self._body[match.end() : match.end() + 1] == b'"':
            return BadJson(f"{wanted} should be", self._body, at)
        if match and match.end() < len(self._body):
            return BadJson("a string has a character or an escape that JSON does not have,", self._body, match.end())
        if match:
            return BadJson("a string that begins there has no end,", self._body, at)
        return BadJson(f"{wanted} should be", self._body, at)


def _taken(found: Asked, key: str, kind: str, text: bytes) -> Asked:
    """With one more member of the body: of several with one name the last counts, as for every engine."""
    if key == "model":
        return found._replace(model=_string(text) if kind == "string" else "", kind=kind)
    if key == "stream":
        return found._replace(stream=text == b"true")
    return found


def _string(text: bytes) -> str:
    """A JSON string's value; bytes that are no UTF-8 name nothing that is known."""
    value = json.loads(text.decode("utf-8", "replace")) if b"\\" in text else text[1:-1].decode("utf-8", "replace")
    assert isinstance(value, str)
    return value


def not_a_name(asked: Asked) -> Refusal:
    """The refusal of a body whose `model` is no string."""
    return Refusal(400, "bad_model", f"`model` in the body must be a string, not {asked.kind}", param="model")
