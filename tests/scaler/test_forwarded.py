"""What engines are told of a request's way."""

import pytest
from multidict import CIMultiDict

from scaler.gateway.forwarded import forwarded


def told(peer: str = "10.0.0.5", prefix: str = "", **headers: str) -> dict[str, str]:
    fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
    raw = [(name.encode(), value.encode()) for name, value in fields]
    found = forwarded(raw, CIMultiDict(fields), peer, prefix)
    assert len({name.lower() for name, _ in found}) == len(found)
    return {name.decode().lower(): value.decode() for name, value in found}


def test_a_request_that_comes_straight_from_its_client() -> None:
    assert told(Host="gateway:8080", Accept="x") == {
        "host": "gateway:8080",
        "accept": "x",
        "x-forwarded-for": "10.0.0.5",
        "x-forwarded-proto": "http",
        "x-forwarded-host": "gateway:8080",
    }
    assert told() == {"x-forwarded-for": "10.0.0.5", "x-forwarded-proto": "http"}


def test_what_a_client_claims_does_not_stand_alone() -> None:
    found = told(X_Forwarded_For="6.6.6.6", Forwarded="for=6.6.6.6;proto=https")
    assert found["x-forwarded-for"] == "6.6.6.6, 10.0.0.5"
    assert found["forwarded"] == "for=6.6.6.6;proto=https, for=10.0.0.5;proto=http"


def test_what_a_proxy_in_front_has_said_stays() -> None:
    found = told(
        X_Forwarded_For="1.2.3.4", X_Forwarded_Proto="https", X_Forwarded_Host="api.example", Host="inner", X_Forwarded_Prefix="/ai/"
    )
    assert found["x-forwarded-for"] == "1.2.3.4, 10.0.0.5"
    assert found["x-forwarded-proto"] == "https"
    assert found["x-forwarded-host"] == "api.example"
    assert found["x-forwarded-prefix"] == "/ai"
    assert told(X_Forwarded_Prefix="/ai", prefix="/models/m")["x-forwarded-prefix"] == "/ai/models/m"
    assert told(prefix="/models/org%2Fm")["x-forwarded-prefix"] == "/models/org%2Fm"


def test_several_fields_of_one_name_are_one_list() -> None:
    raw = [(b"X-Forwarded-For", b"1.1.1.1"), (b"x-forwarded-for", b" 2.2.2.2 "), (b"X-Forwarded-For", b"")]
    found = forwarded(raw, CIMultiDict([("X-Forwarded-For", "1.1.1.1")]), "3.3.3.3", "")
    assert [value for name, value in found if name.lower() == b"x-forwarded-for"] == [b"1.1.1.1, 2.2.2.2, 3.3.3.3"]


@pytest.mark.parametrize(
    ("peer", "address", "element"),
    [
        ("::ffff:10.0.0.5", "10.0.0.5", "for=10.0.0.5;proto=http"),
        ("2001:db8::1", "2001:db8::1", 'for="[2001:db8::1]";proto=http'),
        ("fe80::1%eth0", "fe80::1", 'for="[fe80::1]";proto=http'),
        ("", "unknown", "for=unknown;proto=http"),
    ],
)
def test_addresses(peer: str, address: str, element: str) -> None:
    found = told(peer, Forwarded="for=x")
    assert found["x-forwarded-for"] == address
    assert found["forwarded"] == f"for=x, {element}"
