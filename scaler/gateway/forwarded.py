"""What an engine is told of the way that a request has come: `X-Forwarded-For`, `-Proto`, `-Host`, `-Prefix`, and `Forwarded`. Pure.

Each proxy appends the address from which it got the request. So the last one is the gateway's word, and an engine that trusts the gateway
(uvicorn: --forwarded-allow-ips) reads from there to the left, as far as it trusts who stands there. `Proto` and `Host` that a proxy has set
stay: only the first proxy knows them. `Forwarded` is appended to where there is one, since some engines read it before the others.
Rejected: a list of proxies that are trusted, which is the engine's to have; replacing, which takes the client's address from all who stand
behind an ingress.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from scaler.gateway.answer_parser import Fields

_LISTS = frozenset((b"x-forwarded-for", b"x-forwarded-prefix", b"forwarded"))


def forwarded(fields: Fields, headers: Mapping[str, str], peer: str, prefix: str) -> Fields:
    """The fields of a request with what is known of its way.

    headers: the same, to look names up in; peer: the address that it came from; prefix: what was taken off its path.
    """
    known = "X-Forwarded-For" in headers or "Forwarded" in headers or "X-Forwarded-Prefix" in headers
    before = _taken(fields) if known else {}
    told = [field for field in fields if field[0].lower() not in _LISTS] if known else list(fields)
    address = _address(peer)
    told.append((b"X-Forwarded-For", b", ".join([*before.get(b"x-forwarded-for", ()), address.encode()])))
    if "X-Forwarded-Proto" not in headers:
        told.append((b"X-Forwarded-Proto", b"http"))
    host = headers.get("Host", "").encode("utf-8", "surrogateescape")
    if host and "X-Forwarded-Host" not in headers:
        told.append((b"X-Forwarded-Host", host))
    outer = before.get(b"x-forwarded-prefix", ())
    if prefix or outer:
        told.append((b"X-Forwarded-Prefix", b", ".join(outer).rstrip(b"/") + prefix.encode("utf-8", "surrogateescape")))
    if elements := before.get(b"forwarded"):
        node = f'"[{address}]"' if ":" in address else address
        told.append((b"Forwarded", b", ".join([*elements, f"for={node};proto=http".encode()])))
    return told


def _taken(fields: Fields) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        if name.lower() in _LISTS and value.strip():
            found.setdefault(name.lower(), []).append(value.strip())
    return found


def _address(peer: str) -> str:
    """As it is written in such a field: an IPv4 address that came over IPv6 is one of IPv4."""
    if ":" not in peer:
        return peer or "unknown"
    address = ipaddress.IPv6Address(peer.partition("%")[0])
    return str(address.ipv4_mapped or address)
