"""An engine's redirects, as its client has to see them. Pure.

An engine knows its own paths, and in many cases its own address. Its client knows it under the gateway's address, and under a prefix if the
model stands in the path. So what the engine says of its paths (`Location`, `Content-Location`, a cookie's `Path`) gets the prefix, and its
own address is taken off. An engine that goes by `X-Forwarded-Prefix` has said the prefix already; other hosts' addresses stay.
"""

from __future__ import annotations

import re
from urllib.parse import urljoin, urlsplit

from scaler.gateway.answer_parser import Fields
from scaler.gateway.target import Target

_PLACES = frozenset((b"location", b"content-location"))
_COOKIE_PATH = re.compile(rb"(;\s*path=)(/[^;\s][^;]*)", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}


def seen_from_outside(fields: Fields, target: Target, host: str, engine: tuple[str, int]) -> Fields:
    """An answer's fields. host: as the client calls the gateway; engine: the engine's address and port."""
    return [(name, _field(name.lower(), value, target, host, engine)) for name, value in fields]


def _field(name: bytes, value: bytes, target: Target, host: str, engine: tuple[str, int]) -> bytes:
    if name in _PLACES:
        return _place(value.decode("utf-8", "surrogateescape"), target, host, engine).encode("utf-8", "surrogateescape")
    if name == b"set-cookie" and target.prefix:
        prefix = target.prefix.encode("utf-8", "surrogateescape")
        return _COOKIE_PATH.sub(lambda found: found[1] + (b"" if found[2].startswith(prefix) else prefix) + found[2], value)
    return value


def _place(place: str, target: Target, host: str, engine: tuple[str, int]) -> str:
    try:
        split = urlsplit(place)
        authority = (split.hostname or "", split.port or _PORTS.get(split.scheme or "http", 0)) if split.netloc else None
        ours = _split(host)
    except ValueError:
        return place
    if split.scheme not in {"", "http", "https"}:
        return place
    own = (
        authority is not None
        and authority[1] == engine[1]
        and authority[0] in {engine[0], "localhost", "127.0.0.1", "0.0.0.0", "::1", "::"}
    )
    if authority is None and not target.prefix:
        return place
    if authority is not None and not own and (not target.prefix or ours is None or authority != (ours[0], ours[1] or authority[1])):
        return place
    start = f"{split.scheme + ':' if split.scheme else ''}//{split.netloc}" if authority is not None and not own else ""
    rest = place[len(f"{split.scheme + ':' if split.scheme else ''}//{split.netloc}") :] if authority is not None else place
    if authority is None and not rest.startswith("/"):
        rest = urljoin(target.path, rest)  # it counts from the engine's path, which may have another depth
    rest = rest if rest.startswith("/") else f"/{rest}"
    if (re.split(r"[?#]", rest, maxsplit=1)[0] + "/").startswith(target.prefix + "/") and target.prefix:
        return start + rest
    return start + target.prefix + rest


def _split(host: str) -> tuple[str, int | None] | None:
    split = urlsplit(f"//{host}")
    return (split.hostname, split.port) if split.hostname else None
