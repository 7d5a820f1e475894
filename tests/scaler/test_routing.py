"""Whatever a client sends, a request's model is found as the rules say, or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway import routing

LEDGER = Ledger({"m": ModelLimits(), "org/m": ModelLimits()})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(["model", "stream"]), inner, max_size=4),
    max_leaves=10,
)


@given(JSON)
def test_a_json_body_says_what_python_reads_in_it(value: object) -> None:
    found = routing.asked(json.dumps(value).encode())
    if isinstance(value, dict):
        assert found is not None
        assert found.model == value.get("model")
        assert found.stream == value.get("stream")
    else:
        assert found is None


@given(st.binary() | st.text().map(str.encode))
def test_any_body_is_read_or_not(body: bytes) -> None:
    found = routing.asked(body)
    if found is not None:
        assert isinstance(json.loads(body), dict)


@pytest.mark.parametrize(
    ("sources", "model"),
    [
        ([("body", "m"), ("header", "org/m")], "m"),
        ([("body", "unknown"), ("header", ""), ("path", "org/m")], "org/m"),
        ([("body", None), ("header", "m")], "m"),
    ],
)
def test_the_first_known_model_is_chosen(sources: list[tuple[str, object]], model: str) -> None:
    assert routing.choose(sources, LEDGER) == model
