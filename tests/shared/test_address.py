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


NONE = (
    *("", "8080", "nowhere", "host:", "host:http", "host:65536", "host:-1", "host:80 ", "::1:8080", "[]:80", "host:²", ":", ":x", "::80"),
    *(" host:80", "a b:80", "http://host:80", "host/x:80", "user@host:80", "[host]:80", "[1.2.3.4]:80", "[::1:80", "::1]:80", "*:80"),
    *("[::1]80", "[::g]:80", "host\n:80", "host:+80", "host:8_0", "'host':80"),
)


@pytest.mark.parametrize("text", NONE)
def test_what_is_none_is_named(text: str) -> None:
    for read in (Address.parse, Address.to_listen):
        with pytest.raises(ValueError, match="is not HOST:PORT") as error:
            read(text)
        assert repr(text) in str(error.value)


def test_without_a_host_a_server_has_all_addresses_and_a_client_none() -> None:
    assert Address.to_listen(":8080") == ("", 8080)
    assert str(Address.to_listen(":8080")) == ":8080"
    with pytest.raises(ValueError, match="':8080' is not HOST:PORT"):
        Address.parse(":8080")
