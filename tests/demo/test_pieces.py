"""Text as it becomes certain: characters in parts, stop strings in parts."""

from collections.abc import AsyncIterator

import pytest

from chat import pieces
from language_model import Token


async def tokens(*texts: bytes, finish: str = "length") -> AsyncIterator[Token]:
    for i, text in enumerate(texts):
        yield Token(text, -0.5, finish if i == len(texts) - 1 else None)


@pytest.mark.parametrize(
    ("texts", "stops", "made", "finish"),
    [
        ((b"a", b"b"), (), ["a", "b"], "length"),
        ((b"\xf0\x9f", b"\x98", b"\x80!"), (), ["", "", "😀!"], "length"),
        ((b"\xf0\x9f",), (), ["\ufffd"], "length"),
        ((b"one st", b"op two",), ("stop",), ["one ", ""], "stop"),
        ((b"one st", b"ep"), ("stop",), ["one ", "step"], "length"),
        ((b"one st",), ("stop",), ["one st"], "length"),
        ((b"ab", b"c"), ("bcd", "abc"), ["", ""], "stop"),
        ((b"x.y.z",), (".z", "."), ["x"], "stop"),
    ],
)  # fmt: skip
async def test_pieces(texts: tuple[bytes, ...], stops: tuple[str, ...], made: list[str], finish: str) -> None:
    got = [piece async for piece in pieces(tokens(*texts), stops)]
    assert [piece.text for piece in got] == made
    assert [piece.finish for piece in got] == [None] * (len(made) - 1) + [finish]
