"""A client that sends exactly the bytes that a test wants, and reads exactly what comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SECONDS = 5.0  # nothing here takes as long; what does hangs


class RawClient:
    """A connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *pieces: bytes) -> None:
        self.writer.write(b"".join(pieces))

    def get(self, path: str = "/models/m/x", *fields: bytes, method: str = "GET", version: str = "1.1") -> None:
        lines = [f"{method} {path} HTTP/{version}".encode(), b"Host: gateway", *fields]
        self.send(b"\r\n".join(lines), b"\r\n\r\n")

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(SECONDS):
            return await self.reader.readuntil(end)

    async def head(self) -> bytes:
        return await self.until(b"\r\n\r\n")

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(SECONDS):
            return await self.reader.readexactly(count)

    async def rest(self) -> bytes:
        """All that comes until the gateway closes the connection."""
        async with asyncio.timeout(SECONDS):
            return await self.reader.read()


@asynccontextmanager
async def raw_client(url: str) -> AsyncIterator[RawClient]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**24)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
