"""An engine that says exactly the bytes that a test wants, whatever they are, and closes how the test wants it. On real sockets."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from scaler.gateway.dispatcher import Backend, Endpoint

Serve = Callable[["Asked"], Awaitable[None]]


@dataclass
class Asked:
    """One connection to the engine, on which a request's head has come."""

    head: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int  # of the request, in all connections

    @property
    def length(self) -> int:
        """Bytes of the request's body, as its head says; 0: it says nothing."""
        for line in self.head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return int(line.partition(b":")[2])
        return 0

    def reset(self) -> None:
        """Closes as an engine does that is killed with something unread: the client gets a reset."""
        made: socket.socket = self.writer.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass
class RawEngine:
    """What is known of an engine while it runs. heads: of all requests that came; connections: how many were made."""

    port: int
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0
    ended: asyncio.Queue[None] = field(default_factory=asyncio.Queue)  # one for each connection that the client has closed

    def replica(self, name: str = "r1") -> Backend:
        return Backend(name, "m", Endpoint("127.0.0.1", self.port))


@asynccontextmanager
async def raw_engine(serve: Serve) -> AsyncIterator[RawEngine]:
    """serve: answers one request, of which the head has been read. A connection it leaves open gets the next request."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine.connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                engine.heads.append(head)
                await serve(Asked(head, reader, writer, len(engine.heads)))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            engine.ended.put_nowait(None)
        finally:
            writer.close()

    tasks: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    engine = RawEngine(server.sockets[0].getsockname()[1])
    try:
        yield engine
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def saying(*answers: bytes, close: bool = False) -> Serve:
    """Reads a request with its body, and answers: the first request with the first of these, and so on; the last one repeats."""

    async def serve(asked: Asked) -> None:
        await asked.reader.readexactly(asked.length)
        asked.writer.write(answers[min(asked.number, len(answers)) - 1])
        if close:
            await asked.writer.drain()
            asked.writer.close()

    return serve
