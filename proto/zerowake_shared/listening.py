"""Where servers listen, and what is said when they cannot.

gRPC itself only says that it failed to bind, and asyncio's words leave out who has the port: the address is tried once more, alone, and the
one who has it is looked for.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zerowake_shared.address import Address
from zerowake_shared.lack import startable_threads
from zerowake_shared.port_holder import port_holder

if TYPE_CHECKING:
    import grpc

# A client's pings keep its connection alive through meshes and load balancers. gRPC's servers take them for an attack as they come by
# default: more than two within five minutes, or any on a connection without a call, end it (GOAWAY, too_many_pings).
PINGS_WELCOME = (
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),  # of pings that come sooner: any number
)


_THREADS = min(max(os.cpu_count() or 1, 4), 16) + 4  # that gRPC starts at its first use, and some beside
_LONGEST_PATH = 107  # of a UNIX socket; the kernel's limit


class CannotListen(Exception):
    """The address is taken, or of no use for a server; the message names it."""


class Site(Protocol):
    """One of aiohttp's."""

    async def start(self) -> None: ...


def listen(server: grpc.aio.Server, address: str, who: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Has the server listen on `address`, `HOST:PORT` (port 0: any) or `unix:/path`; returns the address that it has got.

    who: what the server is to people, as in "the external scaler".

    Raises:
        CannotListen: the address is taken or impossible, or there is no room for gRPC's threads.
    """
    check_free(address, who)  # gRPC would write lines of its own about it
    check_threads(who)
    try:
        where = address
        if not address.startswith("unix:"):
            found = Address.to_listen(address)
            where = str(found._replace(host=found.host or "::"))
        port = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
        return address if address.startswith("unix:") else str(Address.parse(where)._replace(port=port))
    except (RuntimeError, ValueError) as error:
        raise CannotListen(f"{who} cannot listen on {address}: {error}") from error


async def started(site: Site, address: Address, who: str) -> None:
    """Starts the site, which listens on `address`. Raises: CannotListen."""
    try:
        await site.start()
    except OSError as error:
        raise CannotListen(f"{who} cannot listen on {address}: {_why(address, error)}") from error


def make_way(path: Path, who: str) -> None:
    """Takes the socket away that an earlier server left: whoever calls knows that none is alive. Raises: CannotListen: it is none."""
    check_free(f"unix:{path}", who)
    path.unlink(missing_ok=True)


def check_free(address: str, who: str) -> None:
    """Whether `address` can be listened on now: before anything else is begun that would have to be undone.

    Raises:
        CannotListen: the address is taken or impossible.
    """
    if why := _tried(address):
        raise CannotListen(f"{who} cannot listen on {address}: {why}")


def check_threads(who: str) -> None:
    """Whether there is room for gRPC's threads, before anything of it is used: it would begin with fewer, and wait for ever for the rest.

    Raises:
        CannotListen: there is none.
    """
    if (able := startable_threads(_THREADS)) < _THREADS:
        raise CannotListen(
            f"{who} cannot serve: that takes {_THREADS} threads, and this process may start {able}: raise its limit of processes (systemd: "
            "TasksMax), and start it again"
        )


def check_all_free(wanted: Iterable[tuple[str, str]]) -> None:
    """The same for each: who, and the address. Raises: CannotListen."""
    for who, address in wanted:
        check_free(address, who)


def _tried(address: str) -> str:
    """Why it cannot be listened on; empty: it can."""
    if address.startswith("unix:"):
        return _path_taken(Path(address.removeprefix("unix:")))
    try:
        host, port = Address.to_listen(address)
        for family, kind, protocol, _, where in socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(where)
                probe.listen(1)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return _why(Address(host, port), error)
    return ""


def _path_taken(path: Path) -> str:
    """Why a socket cannot be there; empty: it can. A socket, or an empty file, is taken for one that was left."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        return f"a socket's path has {_LONGEST_PATH} bytes at most; choose a shorter folder"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    left = not path.exists() or path.is_socket() or (path.is_file() and path.stat().st_size == 0)
    return "" if left else "there is something else at its path; move it away"


def _why(address: Address, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"there is no host {address.host!r} ({error.strerror})"
    if error.errno == errno.EADDRINUSE:
        has = port_holder(address.port)
        return f"the port is in use by {has}; stop that, or choose another" if has else "the port is in use; choose another"
    if error.errno == errno.EACCES:
        return "permission denied: low ports are root's; choose one above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    return error.strerror or str(error)
