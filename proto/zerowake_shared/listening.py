"""Where a gRPC server listens, and what is said when it cannot. gRPC itself only says that it failed to bind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zerowake_shared.address import Address

if TYPE_CHECKING:
    import grpc


# A client's pings keep its connection alive through meshes and load balancers. gRPC's servers take them for an attack as they come by
# default: more than two within five minutes, or any on a connection without a call, end it (GOAWAY, too_many_pings).
PINGS_WELCOME = (
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),  # of pings that come sooner: any number
)


class CannotListen(Exception):
    """The address is taken, or of no use for a server; the message names it."""


def listen(server: grpc.aio.Server, address: str, who: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Has the server listen on `address`, `HOST:PORT` (port 0: any) or `unix:/path`; returns the address that it has got.

    who: what the server is to people, as in "the external scaler".

    Raises:
        CannotListen: the address is taken or impossible.
    """
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        return address if address.startswith("unix:") else str(Address.parse(address)._replace(port=port))
    except (RuntimeError, ValueError) as error:
        raise CannotListen(f"{who} cannot listen on {address}: {error}; stop what has it, or choose another") from error
