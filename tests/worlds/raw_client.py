"""A client that sends exactly the bytes that a test wants, and reads exactly what comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

SECONDS = 5.0  # nothing here takes as long; what does hangs


@dataclass
class RawAnswer:
    """An answer as it came."""

    version: str
    status: int
    headers: dict[str, str]  # by names in small letters
    body: bytes = b""

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


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

    async def begun(self) -> RawAnswer:
        """The next answer's status and headers; an interim one's, too."""
        lines = (await self.head()).decode("latin-1").split("\r\n")
        version, status, _ = f"{lines[0]} ".split(" ", 2)
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        return RawAnswer(version, int(status), {name.lower(): value for name, value in headers.items()})

    async def answer(self) -> RawAnswer:
        """The next answer that is no interim one, whole."""
        found = await self.begun()
        while found.status == 100:
            found = await self.begun()
        if "content-length" in found.headers:
            found.body = await self.exactly(int(found.headers["content-length"]))
        elif found.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.until(b"\r\n"), 16):
                found.body += (await self.exactly(size + 2))[:-2]
            await self.until(b"\r\n")
        else:
            found.body = await self.rest()
        return found

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
