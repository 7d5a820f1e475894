"""Whatever path a client asks for: a model in it is found, and no byte of it is changed."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from scaler.gateway.refusal import Refusal
from scaler.gateway.target import Target, read_target

# What a parsed request target can consist of: aiohttp's parser lets no space, control or non-ASCII character through.
TARGETS = st.text("abcm/%2F.~:;@!$&'()*+,=?[]|^\"<>{}\\`-_0", max_size=40)


@given(TARGETS)
def test_a_target_goes_on_unchanged(rest: str) -> None:
    raw = "/" + rest
    try:
        found = read_target(raw)
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
    found = read_target(raw)
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
        ("http://gateway?x", "/?x", ""),
        ("/echo?", "/echo?", ""),
        ("*", "*", ""),
        ("http://gateway/echo?", "/echo?", ""),
        ("/models/m/echo?", "/echo?", "m"),
    ],
)
def test_targets(raw: str, path: str, model: str) -> None:
    target = read_target(raw)
    assert (target.path, target.model) == (path, model)


@pytest.mark.parametrize(
    ("raw", "path", "model", "prefix"),
    [
        ("/models/org/m/v1/chat", "/v1/chat", "org/m", "/models/org/m"),
        ("/models/org/m", "/", "org/m", "/models/org/m"),
        ("/models/org/m/", "/", "org/m", "/models/org/m"),
        ("/models/org%2Fm/v1/chat", "/v1/chat", "org/m", "/models/org%2Fm"),
        ("/models/org/m/extra", "/", "org/m/extra", "/models/org/m/extra"),  # the longest name that is known
        ("/models/org%2Fm/extra%2fx?y", "/extra%2fx?y", "org/m", "/models/org%2Fm"),
        ("/models/org/other", "/other", "org", "/models/org"),
        ("/models//srv/weights/v1/chat", "/v1/chat", "/srv/weights", "/models//srv/weights"),
        ("/models/nobody/knows/v1/chat", "/v1/chat", "nobody/knows", "/models/nobody/knows"),
        ("/models/nobody/knows", "/knows", "nobody", "/models/nobody"),
    ],
)
def test_a_name_with_slashes(raw: str, path: str, model: str, prefix: str) -> None:
    known = {"org", "org/m", "org/m/extra", "/srv/weights"}
    assert read_target(raw, known.__contains__) == Target(path, model, prefix)


@pytest.mark.parametrize("raw", ["gateway:443", "ftp://x/y?key=secret", "http://[secret/"])
def test_targets_that_are_no_path(raw: str) -> None:
    with pytest.raises(Refusal, match="is not a path") as refused:
        read_target(raw)
    assert "secret" not in str(refused.value)
