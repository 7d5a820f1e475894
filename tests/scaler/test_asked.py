"""What a JSON body asks for, as engines read it; what none of them takes is refused where it breaks."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.gateway import asked
from scaler.gateway.asked import Asked, BadJson

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(["model", "stream"]), inner, max_size=4),
    max_leaves=20,
)
KINDS = {type(None): "null", bool: "boolean", int: "number", float: "number", list: "array", dict: "object", str: "string"}


@given(ANY, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_it_is_what_python_reads(value: object, indent: int | str | None, escaped: bool) -> None:
    try:
        body = json.dumps(value, indent=indent, ensure_ascii=escaped).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only stands in escapes
        body = json.dumps(value, indent=indent).encode()
    if not isinstance(value, dict):
        with pytest.raises(BadJson, match="not an object"):
            asked.leniently(body)
        return
    model = value.get("model")
    told = Asked(model if isinstance(model, str) else "", value.get("stream") is True, KINDS[type(model)])
    assert asked.leniently(body) == told
    assert asked.strictly(body) in (told, None)


@given(st.binary() | st.text('{}[],:"\\model stream01-+.eEtrufalsn\n\x00é').map(str.encode))
def test_no_body_is_taken_that_python_refuses(body: bytes) -> None:
    try:
        asked.leniently(body)
    except BadJson:
        with pytest.raises((ValueError, AssertionError, RecursionError)):
            assert isinstance(json.loads(body), dict)
    else:
        assert isinstance(json.loads(body.decode(json.detect_encoding(body), "replace")), dict)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "temperature": NaN, "top_p": Infinity, "x": -Infinity}',
        b'\xef\xbb\xbf{"model": "m"}',
        '{"model": "m"}'.encode("utf-16"),
        '{"model": "m"}'.encode("utf-32-be"),
        b'{"model": "m", "stop": "\\ud800"}',
        b'{"model": "m", "stop": "\xff\xfe", "x": NaN}',
        b'{"model": 3, "x": NaN, "model": "m"}',
        b'{"x": [{"model": "other"}, NaN], "\\u006dodel": "m", "y": {"model": "other"}}',
        b'{"model": "m", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x": ' + b'{"model":' * 50_000 + b"1" + b"}" * 50_000 + b', "model": "m"}',
        b'{"model": "m", "x": 1' + b"0" * 10_000 + b"}",
    ],
)
def test_what_some_engine_takes_is_taken(body: bytes) -> None:
    assert (asked.strictly(body) or asked.leniently(body)).model == "m"


def test_a_model_that_nests_deeply_is_no_string() -> None:
    body = b'{"model": ' + b"[" * 5_000 + b"]" * 5_000 + b"}"
    assert asked.strictly(body) is None
    assert asked.leniently(body).kind == "array"


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"model":"chat",', "line 1, column 17 (byte 16)"),
        (b'{"model":"chat"', "line 1, column 16 (byte 15)"),
        (b'{\n  "model": "chat",\n  "x": tru\n}', "line 3, column 8 (byte 28)"),
        (b'{"model": "chat", }', "line 1, column 19 (byte 18)"),
        (b'{"x": [1, 2,], "model": "chat"}', "column 13 (byte 12)"),
        (b'{"x": {"y": 1,}, "model": "chat"}', "column 15 (byte 14)"),
        (b"{'model': 'chat'}", "column 2 (byte 1)"),
        (b'{"model": "chat"} {', "column 19 (byte 18)"),
        (b'{"model": "chat', "column 11 (byte 10)"),
        (b'{"model": "chat", "x": "a\nb"}', "column 26 (byte 25)"),
        (b'{"model": "chat", "x": "\\x"}', "column 25 (byte 24)"),
        (b'{"model": "chat", "x": 01}', "column 24 (byte 23)"),
        (b'{"model" "chat"}', "column 10 (byte 9)"),
        (b'["chat"]', "JSON array, not an object, at line 1, column 1"),
        (b"\xff\xfe{", "utf-16"),
    ],
)
def test_what_no_engine_takes_is_told_with_its_place(body: bytes, where: str) -> None:
    assert asked.strictly(body) is None
    with pytest.raises(BadJson) as broken:
        asked.leniently(body)
    assert where in str(broken.value)
