"""HOST:PORT, as people write it in files and on command lines."""

from __future__ import annotations

from typing import NamedTuple


class Address(NamedTuple):
    """A host, which is a name or an IP address without brackets, and a port; 0: any that is free."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `HOST:PORT`; an IPv6 address stands in brackets, as in `[::1]:8080`.

        Raises:
            ValueError: it is none; the message says what was given.
        """
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""  # where its last colon belongs, nobody can say
        if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
