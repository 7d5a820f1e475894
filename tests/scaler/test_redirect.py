"""Where an engine sends its clients, as they see it."""

import pytest

from scaler.gateway.redirect import seen_from_outside
from scaler.gateway.target import Target

ENGINE = ("127.0.0.1", 8000)
UNDER = Target("/docs/page?x=1", "m", "/models/m")
ROOT = Target("/docs/page?x=1")


def place(value: str, target: Target = UNDER, host: str = "gateway:8080") -> str:
    ((_, found),) = seen_from_outside([(b"Location", value.encode())], target, host, ENGINE)
    return found.decode()


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("/x", "/models/m/x"),
        ("/x?y=/z#f", "/models/m/x?y=/z#f"),
        ("/", "/models/m/"),
        ("x", "/models/m/docs/x"),
        ("../x", "/models/m/x"),
        ("../../../x", "/models/m/x"),
        ("?x=2", "/models/m/docs/page?x=2"),
        ("http://127.0.0.1:8000/x", "/models/m/x"),
        ("http://localhost:8000/x?y", "/models/m/x?y"),
        ("http://0.0.0.0:8000", "/models/m/"),
        ("//127.0.0.1:8000/x", "/models/m/x"),
        ("http://gateway:8080/x", "http://gateway:8080/models/m/x"),
        ("https://gateway:8080/x", "https://gateway:8080/models/m/x"),
        ("//gateway:8080/x", "//gateway:8080/models/m/x"),
        ("/models/m/x", "/models/m/x"),
        ("/models/m?x", "/models/m?x"),
        ("/models/mine", "/models/m/models/mine"),
        ("http://gateway:8080/models/m/x", "http://gateway:8080/models/m/x"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x"),
        ("mailto:x@example", "mailto:x@example"),
        ("http://[bad/x", "http://[bad/x"),
        ("/caf\u00e9", "/models/m/caf\u00e9"),
    ],
)
def test_it_stays_under_the_prefix(said: str, seen: str) -> None:
    assert place(said) == seen


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("/x", "/x"),
        ("x", "x"),
        ("http://127.0.0.1:8000/x", "/x"),
        ("http://gateway:8080/x", "http://gateway:8080/x"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x"),
    ],
)
def test_without_a_prefix_the_engines_own_address_is_taken_off(said: str, seen: str) -> None:
    assert place(said, ROOT) == seen


def test_default_ports() -> None:
    assert place("http://gateway/x", host="gateway") == "http://gateway/models/m/x"
    assert place("https://gateway:443/x", host="gateway") == "https://gateway:443/models/m/x"


def test_other_fields_stay_and_cookies_keep_to_the_model() -> None:
    fields = [
        (b"X-Location", b"/x"),
        (b"Set-Cookie", b"a=/b; Path=/x; HttpOnly"),
        (b"set-cookie", b"a=b; path=/"),
        (b"Set-Cookie", b"a=b; Path=/models/m/x"),
        (b"Content-Location", b"/x"),
    ]
    assert [value for _, value in seen_from_outside(fields, UNDER, "gateway", ENGINE)] == [
        b"/x",
        b"a=/b; Path=/models/m/x; HttpOnly",
        b"a=b; path=/",
        b"a=b; Path=/models/m/x",
        b"/models/m/x",
    ]
    assert seen_from_outside(fields, ROOT, "gateway", ENGINE) == fields
