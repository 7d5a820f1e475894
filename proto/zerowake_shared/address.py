"""HOST:PORT, as people write it in files and on command lines."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

_HOST = re.compile(r"[^\s\x00-\x1f/@?#\[\]\\:*,;'\"()<>]+")


class Address(NamedTuple):
    """A host, which is a name or an IP address without brackets, and a port; 0: any that is free. Without a host: all of this machine's."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `HOST:PORT`; an IPv6 address stands in brackets, as in `[::1]:8080`.

        Raises:
            ValueError: it is none; the message says what was given.
        """
        found = cls.to_listen(text)
        if not found.host:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return found

    @classmethod
    def to_listen(cls, text: str) -> Address:
        """The same, for a server's own address: `:8080` is port 8080 of every address that this machine has.

        Raises:
            ValueError: it is none; the message says what was given.
        """
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        fits = bool(colon) and (_is_ipv6(bare) if host != bare else not host or _HOST.fullmatch(host) is not None)
        if not fits or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8080, [::1]:8080 or, for all addresses, :8080")
        return cls(bare, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
