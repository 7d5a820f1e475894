"""Where an engine listens, as the kernel shows it: so that one which listens elsewhere is told so, and not only that nobody answers.

The sockets themselves can be taken along, by who answers in the place of an engine that sleeps (doorkeeper.py).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from restore_agent.places.processes import taken_over
from zerowake_shared.lack import passes

_LISTENS = "0A"  # state of a socket
_INODE = 5  # of the fields behind that
_REACHED = {"127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"}  # addresses at which 127.0.0.1 finds it


def listens_elsewhere(host_pid: int, port: int) -> str:
    """In words; empty where something listens on 127.0.0.1 and that port, where nothing listens at all, and where it has ended."""
    found = sorted({(address, number) for address, number, _ in _listening(host_pid)})
    if not found or any(number == port and address in _REACHED for address, number in found):
        return ""
    places = [f"[{address}]:{number}" if ":" in address else f"{address}:{number}" for address, number in found]
    return f"it listens on {', '.join(places[:4])}, not on 127.0.0.1:{port}"


def listening_sockets(host_pids: Iterable[int], port: int) -> list[socket.socket]:
    """The sockets of these processes that listen on the port, as they have them, each once: the caller's to close. Empty: there are none.

    They are one with the engine's: whether they block, for one, must be left as it is. Raises OSError: we lack descriptors for them.
    """
    pids = list(host_pids)
    wanted = {f"socket:[{inode}]" for pid in pids[:1] for _, number, inode in _listening(pid) if number == port}
    found: list[socket.socket] = []
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                name = str(link.readlink())
                if name in wanted:
                    found.append(_taken(pid, int(link.name)))
                    wanted.remove(name)
        except OSError as error:
            if passes(error):
                for each in found:
                    each.close()
                raise
            # It has ended, or closed the socket.
    return found


def _taken(pid: int, fd: int) -> socket.socket:
    pidfd = os.pidfd_open(pid)
    try:
        return socket.socket(fileno=taken_over(pidfd, fd))
    finally:
        os.close(pidfd)


def _listening(host_pid: int) -> Iterator[tuple[str, int, str]]:
    """Address, port and inode of each."""
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/{host_pid}/net/{table}").read_text().splitlines()[1:]
        except OSError as error:
            if passes(error):
                raise
            continue  # it has ended, or the kernel has no IPv6
        for row in rows:
            _, local, _, state, *rest = row.split()
            if state == _LISTENS:
                words, _, port = local.partition(":")
                yield _address(words), int(port, 16), rest[_INODE]


def _address(words: str) -> str:
    """Of words of 32 bits, each as this processor stores it."""
    raw = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
    if len(raw) == 16 and raw.startswith(b"\0" * 10 + b"\xff\xff"):
        return f"::ffff:{ipaddress.IPv4Address(raw[12:])}"
    return str(ipaddress.ip_address(raw))
