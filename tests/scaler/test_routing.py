"""Whatever a client sends, a request's model is found as the rules say, or refused; and no byte of a path is changed."""

import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway import routing
from scaler.gateway.refusal import Refusal

LEDGER = Ledger({"m": ModelLimits(), "org/m": ModelLimits()})
# What a parsed request target can consist of: aiohttp's parser lets no space, control or non-ASCII character through.
TARGETS = st.text("abcm/%2F.~:;@!$&'()*+,=?[]|^\"<>{}\\`-_0", max_size=40)


@given(TARGETS)
def test_a_target_goes_on_unchanged(rest: str) -> None:
    raw = "/" + rest
    try:
        found = routing.target(raw)
    except Refusal as refusal:
        assert refusal.status == 404
        assert raw.startswith("/models/")
        return
    if found.model:
        assert raw.startswith("/models/")
        assert raw.endswith(found.path.removeprefix("/"))
    else:
        assert found.path == raw
    # The way to the engine keeps it too: this is what its client writes into the request line.
    assert URL("http://127.0.0.1:1" + found.path, encoded=True).raw_path_qs.rstrip("?") == found.path.rstrip("?")


@given(st.text(min_size=1), TARGETS.filter(lambda rest: "?" not in rest), st.text("ab=&/?", max_size=9))
def test_a_model_in_the_path(name: str, rest: str, query: str) -> None:
    raw = f"/models/{quote(name, safe='', errors='surrogatepass')}/{rest}?{query}"
    found = routing.target(raw)
    assert found.path == f"/{rest}?{query}"
    assert found.model == name or max(name) >= "\ud800"


@pytest.mark.parametrize(
    ("raw", "path", "model"),
    [
        ("/models/m", "/", "m"),
        ("/models/m/", "/", "m"),
        ("/models/m?x=1", "/?x=1", "m"),
        ("/models/org%2Fm/v1/chat", "/v1/chat", "org/m"),
        ("/modelsx/m", "/modelsx/m", ""),
        ("/v1/models/m", "/v1/models/m", ""),
        ("http://gateway:80/models/m/v1?x", "/v1?x", "m"),
        ("http://gateway", "/", ""),
    ],
)
def test_targets(raw: str, path: str, model: str) -> None:
    assert routing.target(raw) == routing.Target(path, model)


@pytest.mark.parametrize("raw", ["*", "gateway:443", "ftp://x/y"])
def test_targets_that_are_no_path(raw: str) -> None:
    with pytest.raises(Refusal, match="is not a path"):
        routing.target(raw)


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


@pytest.mark.parametrize(
    ("headers", "length", "named", "read"),
    [
        ({"Content-Type": "application/json"}, 10, True, True),
        ({"Content-Type": "application/problem+json; charset=utf-8"}, 10, True, True),
        ({"Content-Type": "application/json"}, 101, True, False),
        ({"Content-Type": "application/json"}, None, True, False),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 10, True, False),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 10, True, False),
        ({}, None, False, True),
    ],
)
def test_which_bodies_are_read_for_their_model(headers: dict[str, str], length: int | None, named: bool, read: bool) -> None:
    assert routing.body_first(headers, length, 100, named) is read


def test_wishes() -> None:
    assert routing.priority({}) is Priority.NORMAL
    assert routing.priority({"X-Zerowake-Priority": " High"}) is Priority.HIGH
    assert routing.heartbeat({}) is None
    assert routing.heartbeat({"X-Zerowake-Heartbeat": "1.5"}) == 1.5
    for bad in ("0", "-1", "nan", "inf", "soon", ""):
        with pytest.raises(Refusal, match="X-Zerowake-Heartbeat must be a number of seconds"):
            routing.heartbeat({"X-Zerowake-Heartbeat": bad})


def test_tenants() -> None:
    assert routing.tenant({}) == "anonymous"
    secret = routing.tenant({"Authorization": "Bearer secret"})
    assert secret == routing.tenant({"Authorization": "Bearer secret"})
    assert secret != routing.tenant({"Authorization": "Bearer other"})
    assert "secret" not in secret
    assert routing.tenant({"Authorization": "Bearer secret", "X-Zerowake-Tenant": "t"}) == "tenant:t"
