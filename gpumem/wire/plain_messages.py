"""Protobuf's messages without protobuf, for engines whose image has another version of that library, or none.

Generated code refuses a protobuf library that is older than the compiler it came from, and an engine's image pins the version that the
engine was tested with. So an engine that gpumem's client is put beside (in a pod) gets `gpumem.proto` as a table, which the restore agent
writes from the descriptor that protoc made, and this file makes classes of it: with the part of protobuf's own interface that the client
uses, and the same bytes, since a region's id is the hash of a serialized message. Where zerowake is installed beside the engine by pip,
protobuf itself is used as ever.

Rejected: protobuf's pure Python part under another name, which has to be rewritten at each of its imports, and takes 30 times the code;
another encoding on the socket, which would be two protocols.

Not here, since the protocol has none of it: maps, groups, extensions, signed and fixed integers. Fields that are not known are dropped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # how a value is written
_DOUBLE = struct.Struct("<d")
_LONGEST_VARINT = 10  # bytes
_DEFAULTS: dict[str, Any] = {"uint": 0, "bool": False, "double": 0.0, "string": "", "bytes": b""}


class DecodeError(ValueError):
    """Bytes that are no such message."""


class Field(NamedTuple):
    """One field of a message, as the table has it."""

    number: int
    name: str
    kind: str  # uint (of whichever width, and enums), bool, double, string, bytes, or the name of a message
    repeated: bool = False
    group: str = ""  # the oneof that it belongs to; an `optional` field is alone in one


class Messages:
    """Of one field: a list that makes what it holds."""

    def __init__(self, kind: type[Message], given: Iterable[Message] = ()) -> None:
        self._kind = kind
        self._all = list(given)

    def add(self, **fields: Any) -> Any:
        self._all.append(self._kind(**fields))
        return self._all[-1]

    def append(self, message: Message) -> None:
        self._all.append(message)

    def extend(self, messages: Iterable[Message]) -> None:
        self._all.extend(messages)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Messages | list) and self._all == list(other)

    __hash__ = None  # type: ignore[assignment]


class Message:
    """What all messages are: fields by name, each with its default until it is set. To read a message field that is not set gives an
    empty one, and does not set it."""

    FIELDS: ClassVar[Mapping[str, Field]] = {}
    NUMBERS: ClassVar[Mapping[int, Field]] = {}
    KINDS: ClassVar[Mapping[str, type[Message]]] = {}  # all messages of the table, by name

    def __init__(self, **fields: Any) -> None:
        object.__setattr__(self, "_values", {})
        for name, value in fields.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        field = type(self).FIELDS.get(name)
        if field is None:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        values: dict[str, Any] = self.__dict__["_values"]
        if name in values:
            return values[name]
        kind = self.KINDS.get(field.kind)
        if field.repeated:
            return values.setdefault(name, Messages(kind) if kind else [])
        return kind() if kind else _DEFAULTS[field.kind]

    def __setattr__(self, name: str, value: Any) -> None:
        field = type(self).FIELDS.get(name)
        if field is None:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        if field.repeated:
            kind = self.KINDS.get(field.kind)
            value = Messages(kind, value) if kind else list(value)
        elif field.group:
            self._clear(field.group)
        self.__dict__["_values"][name] = value

    def _clear(self, group: str) -> None:
        for other in type(self).FIELDS.values():
            if other.group == group:
                self.__dict__["_values"].pop(other.name, None)

    def HasField(self, name: str) -> bool:
        return name in self.__dict__["_values"]

    def WhichOneof(self, group: str) -> str | None:
        return next((name for name, field in type(self).FIELDS.items() if field.group == group and self.HasField(name)), None)

    def SerializeToString(self, deterministic: bool = True) -> bytes:
        """The same bytes as protobuf writes, field after field by number."""
        written = bytearray()
        for field in type(self).NUMBERS.values():
            if field.name in self.__dict__["_values"]:
                _write(written, field, self.__dict__["_values"][field.name])
        return bytes(written)

    @classmethod
    def FromString(cls, data: bytes) -> Self:
        """Raises DecodeError."""
        message = cls()
        for number, how, value in _read(memoryview(data)):
            if (field := cls.NUMBERS.get(number)) is not None:
                message._take(field, how, value)
        return message

    def _take(self, field: Field, how: int, value: Any) -> None:
        kind = self.KINDS.get(field.kind)
        if how != _way(field.kind):
            if not (field.repeated and how == _LENGTH and _way(field.kind) != _LENGTH):
                raise DecodeError(f"field {field.name} of {type(self).__name__} is written as {field.kind} never is")
            getattr(self, field.name).extend(_unpacked(field.kind, value))
            return
        read = kind.FromString(value) if kind else _value(field.kind, value)
        if field.repeated:
            getattr(self, field.name).append(read)
        else:
            setattr(self, field.name, read)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.SerializeToString() == other.SerializeToString()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__['_values'].items())})"


def defined(messages: Mapping[str, Sequence[Sequence[Any]]], enums: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Classes by name, as a generated module has them.

    messages: name → fields, as `Field` has them. enums: name, with that of the message that it stands in before a dot → numbers by name.
    """
    kinds: dict[str, type[Message]] = {}
    for name, rows in messages.items():
        fields = [Field(*row) for row in rows]
        by_number = {field.number: field for field in sorted(fields)}
        namespace = {"FIELDS": {field.name: field for field in fields}, "NUMBERS": by_number, "KINDS": kinds}
        kinds[name] = type(name, (Message,), namespace)
    found: dict[str, Any] = dict(kinds)
    for name, numbers in enums.items():
        owner, _, _ = name.rpartition(".")
        for key, number in numbers.items():
            if owner:
                setattr(kinds[owner], key, number)
            else:
                found[key] = number
    return found


def _way(kind: str) -> int:
    return {"uint": _VARINT, "bool": _VARINT, "double": _FIXED64}.get(kind, _LENGTH)


def _write(written: bytearray, field: Field, value: Any) -> None:
    way = _way(field.kind)
    if not field.repeated:
        if field.group or isinstance(value, Message) or value != _DEFAULTS[field.kind]:
            _tag(written, field.number, way)
            _write_one(written, field.kind, value)
    elif way != _LENGTH and len(value):  # numbers are packed
        packed = bytearray()
        for each in value:
            _write_one(packed, field.kind, each)
        _tag(written, field.number, _LENGTH)
        _varint(written, len(packed))
        written += packed
    elif way == _LENGTH:
        for each in value:
            _tag(written, field.number, way)
            _write_one(written, field.kind, each)


def _write_one(written: bytearray, kind: str, value: Any) -> None:
    if kind == "double":
        written += _DOUBLE.pack(value)
    elif kind in ("uint", "bool"):
        _varint(written, int(value))
    else:
        content = value.SerializeToString() if isinstance(value, Message) else value.encode() if kind == "string" else bytes(value)
        _varint(written, len(content))
        written += content


def _tag(written: bytearray, number: int, way: int) -> None:
    _varint(written, number << 3 | way)


def _varint(written: bytearray, value: int) -> None:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} is no number of 64 bits")
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)


def _read(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Number, way and value of each field as it is written."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, way = tag >> 3, tag & 7
        if not number or tag >> 32:
            raise DecodeError(f"field {number}, which there cannot be")
        if way == _VARINT:
            value, at = _read_varint(data, at)
            yield number, way, value
            continue
        if way == _LENGTH:
            size, at = _read_varint(data, at)
        elif way in (_FIXED64, _FIXED32):
            size = 8 if way == _FIXED64 else 4
        else:
            raise DecodeError(f"a field of kind {way}, which there is not")
        if size > len(data) - at:
            raise DecodeError("a field is longer than its message")
        yield number, way, data[at : at + size]
        at += size


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_LONGEST_VARINT):
        if at + index >= len(data):
            raise DecodeError("a message ends within a number")
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80 and value < 1 << 64:
            return value, at + index + 1
    raise DecodeError("a number is longer than 64 bits")


def _value(kind: str, read: Any) -> Any:
    if kind == "uint":
        return read
    if kind == "bool":
        return bool(read)
    if kind == "double":
        return _DOUBLE.unpack(read)[0]
    if kind == "bytes":
        return bytes(read)
    try:
        return bytes(read).decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"a string that is no UTF-8: {error}") from None


def _unpacked(kind: str, data: memoryview) -> Iterator[Any]:
    if kind == "double":
        if len(data) % _DOUBLE.size:
            raise DecodeError("packed numbers end within one")
        yield from (value for (value,) in _DOUBLE.iter_unpack(data))
        return
    at = 0
    while at < len(data):
        value, at = _read_varint(data, at)
        yield _value(kind, value)
