"""JSON that somebody else has written."""

from __future__ import annotations

import pytest

from zerowake_shared.json_text import parsed


@pytest.mark.parametrize("text", ['{"a": [1, null]}', b'{"a": [1, null]}', bytearray(b'{"a": [1, null]}')])
def test_a_text_is_its_value(text: str | bytes | bytearray) -> None:
    assert parsed(text) == {"a": [1, None]}


@pytest.mark.parametrize("text", ["{", b"\xff", "[" * 100_000, b'{"a":' * 100_000], ids=["torn", "no text", "deep", "deep objects"])
def test_what_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parsed(text)
