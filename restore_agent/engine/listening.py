"""Where an engine listens, as the kernel shows it: so that one which listens elsewhere is told so, and not only that nobody answers."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTENS = "0A"  # state of a socket
_REACHED = {"127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"}  # addresses at which 127.0.0.1 finds it


def listens_elsewhere(host_pid: int, port: int) -> str:
    """In words; empty where something listens on 127.0.0.1 and that port, where nothing listens at all, and where it has ended."""
    found = sorted(set(_listening(host_pid)))
    if not found or any(number == port and address in _REACHED for address, number in found):
        return ""
    places = [f"[{address}]:{number}" if ":" in address else f"{address}:{number}" for address, number in found]
    return f"it listens on {', '.join(places[:4])}, not on 127.0.0.1:{port}"


def _listening(host_pid: int) -> Iterator[tuple[str, int]]:
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/{host_pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:  # it has ended, or the kernel has no IPv6
            continue
        for row in rows:
            _, local, _, state, *_ = row.split()
            if state == _LISTENS:
                words, _, port = local.partition(":")
                yield _address(words), int(port, 16)


def _address(words: str) -> str:
    """Of words of 32 bits, each as this processor stores it."""
    raw = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
    if len(raw) == 16 and raw.startswith(b"\0" * 10 + b"\xff\xff"):
        return f"::ffff:{ipaddress.IPv4Address(raw[12:])}"
    return str(ipaddress.ip_address(raw))
