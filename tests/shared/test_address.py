"""HOST:PORT in all its spellings."""

import pytest

from zerowake_shared.address import Address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("0.0.0.0:8080", "0.0.0.0", 8080),
        ("localhost:0", "localhost", 0),
        ("scaler.zerowake.svc:65535", "scaler.zerowake.svc", 65535),
        ("[::1]:8080", "::1", 8080),
        ("[::]:9443", "::", 9443),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
    ],
)
def test_what_is_an_address_and_back(text: str, host: str, port: int) -> None:
    found = Address.parse(text)
    assert (found.host, found.port) == (host, port)
    assert str(found) == text
    assert tuple(found) == (host, port), "as asyncio and aiohttp take it"


@pytest.mark.parametrize(
    "text", ["", "8080", ":8080", "nowhere", "host:", "host:http", "host:65536", "host:-1", "host:80 ", "::1:8080", "[]:80", "host:²"]
)
def test_what_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT") as error:
        Address.parse(text)
    assert repr(text) in str(error.value)
