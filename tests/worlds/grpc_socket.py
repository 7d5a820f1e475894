"""A gRPC server at a UNIX socket, as kubelets and container runtimes have theirs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc


@contextlib.asynccontextmanager
async def served_at(socket: Path, add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[None]:
    """`add`: puts its services in. It is gone with the block, and whoever is connected is cut off."""
    server = grpc.aio.server()
    add(server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
