"""What fuzzing asks of a parser: whatever it is given, it says what is there or refuses it by its own error, soon, and in little memory."""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 2.0  # of a processor, for an input of some kilobytes
MEMORY = 512 << 20  # bytes of address space beyond what the program had
LARGEST = 1 << 16  # bytes of an input


class Parser(NamedTuple):
    """samples: real ones, small. parse: the product's own, and what has to be true of what it returns. refuses: what it may raise.
    odd: more to begin with, which it may refuse."""

    name: str
    samples: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...]
    odd: tuple[bytes, ...] = ()

    @property
    def seeds(self) -> tuple[bytes, ...]:
        return self.samples + self.odd


class Slow(AssertionError):
    """An input took too long."""


def check(parser: Parser, data: bytes) -> None:
    """Raises: whatever the parser raises that is not its own; Slow."""
    begun = time.process_time()
    with contextlib.suppress(*parser.refuses):
        parser.parse(data)
    if (took := time.process_time() - begun) > SECONDS:
        raise Slow(f"{parser.name} took {took:.1f} s of a processor over {len(data)} bytes")


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Inside the block, what would take much more memory raises MemoryError, which is no parser's own error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_NUMBERS = (0, 1, -1, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
_ODD: tuple[Any, ...] = (
    None, True, "", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "é" * 70, -1, 0, 1 << 63, 10**30, 1e308, 0.5, [], {}, [[]]
)  # fmt: skip
_TEXTS = (
    b"\0", b"\r\n", b"\r\n\r\n", b"../", b"/", b"%2e%2e%2f", b"\xff\xfe", b"\xed\xa0\x80", b"9" * 5000, b"[" * 5000, b'{"a":' * 3000,
    b"NaN", b"1e999",
    b": ", b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"\xff" * 10, "٣".encode(), b"-", b"\"", b"\\u0000",
)  # fmt: skip
_DIGITS = re.compile(rb"\d+")


def mutated(data: bytes, chance: random.Random, samples: tuple[bytes, ...]) -> bytes:
    """Another input, by a few changes to this one: of bits, lengths, numbers and structure, where it has some."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        data = chance.choice(_CHANGES)(data, chance, samples)
    return data[:LARGEST]


def _flip(data: bytes, chance: random.Random, _: tuple[bytes, ...]) -> bytes:
    found = bytearray(data or b"\0")
    found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    return bytes(found)


def _length(data: bytes, chance: random.Random, _: tuple[bytes, ...]) -> bytes:
    """Some bytes become a number that is at the edge of what they can say."""
    word = struct.pack(chance.choice(("<I", ">I", "<Q", ">Q", "<H", ">H")).replace("I", "i").replace("Q", "q").replace("H", "h"), 0)
    number = chance.choice(_NUMBERS) & ((1 << 8 * len(word)) - 1)
    at = chance.randrange(len(data) + 1)
    return data[:at] + number.to_bytes(len(word), chance.choice(("little", "big"))) + data[at + len(word) :]


def _token(data: bytes, chance: random.Random, _: tuple[bytes, ...]) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(_TEXTS) + data[at + chance.choice((0, 0, 1, 4)) :]


def _cut(data: bytes, chance: random.Random, _: tuple[bytes, ...]) -> bytes:
    begin, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
    return chance.choice((data[:begin], data[:begin] + data[end:], data[:end] + data[begin:]))


def _splice(data: bytes, chance: random.Random, samples: tuple[bytes, ...]) -> bytes:
    other = chance.choice(samples)
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def _number(data: bytes, chance: random.Random, _: tuple[bytes, ...]) -> bytes:
    """A number that is written in digits becomes another."""
    found = list(_DIGITS.finditer(data))
    if not found:
        return data
    where = chance.choice(found)
    return (
        data[: where.start()] + chance.choice((str(chance.choice(_NUMBERS)), "0" * 30, "9" * 30, "9" * 5000)).encode() + data[where.end() :]
    )


def _json(data: bytes, chance: random.Random, _: tuple[bytes, ...]) -> bytes:
    """A value somewhere in JSON becomes another, goes, or comes twice."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    at = value
    while isinstance(at, dict | list) and at:
        key: Any = chance.choice(list(at)) if isinstance(at, dict) else chance.randrange(len(at))
        if isinstance(at[key], dict | list) and at[key] and chance.random() < 0.8:
            at = at[key]
            continue
        how = chance.randrange(4)
        if how == 0:
            del at[key]
        elif how == 1 and isinstance(at, dict):
            at[str(chance.choice(_ODD))] = at.pop(key)
        else:
            at[key] = chance.choice(_ODD)
        break
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return data


_CHANGES = (_flip, _length, _token, _cut, _splice, _number, _json, _json)
