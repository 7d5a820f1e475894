"""Another agent as a source: what peer_server.py serves there, read by blocking sockets in threads (that file says why).

A peer is asked for one snapshot. For a chunk that has not come to it yet it is waited as long as `patience` says. A connection serves one
read at a time and is kept for the next; one whose read was given up in the middle is cut, since what is still on its way nobody wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from restore_agent.snapshots.chunks import CHUNK
from restore_agent.transfer.peer_connection import Connection
from restore_agent.transfer.source import Altered, Piece, TransferError
from restore_agent.transfer.spare_memory import SpareMemory
from zerowake_shared.address import Address

_THREADS = 64  # reads at the same time, of all peers: many of them wait for chunks to come
_T = TypeVar("_T")


class Peers:
    """Other agents, with their connections. Use `with Peers(…)`; leaving it blocks until no thread is left, which is a moment."""

    def __init__(self, contexts: Callable[[], ssl.SSLContext]) -> None:
        """`contexts`: makes the context of the next connection (zerowake_shared.tls.client_contexts)."""
        self._contexts = contexts
        self._threads = ThreadPoolExecutor(_THREADS, "peers")
        self._lines: dict[str, _Line] = {}  # by address
        self._spare = SpareMemory(CHUNK)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines.values():
            line.close()
        self._threads.shutdown(wait=True)

    def peer(self, address: str, namespace: str, digest: str, patience: float = 0.0) -> Peer:
        """The agent at HOST:PORT, for this snapshot. Raises ValueError: that is no address."""
        line = self._lines.get(address)
        if line is None:
            line = self._lines[address] = _Line(Address.parse(address), self._contexts)
        return Peer(line, self._threads, self._spare, f"/{namespace}/{digest}/", patience)


class Peer:
    """One agent as the source of one snapshot."""

    def __init__(self, line: _Line, threads: ThreadPoolExecutor, spare: SpareMemory, prefix: str, patience: float) -> None:
        """`spare`: for a chunk each."""
        self._line = line
        self._threads = threads
        self._spare = spare
        self._prefix = prefix
        self._patience = patience

    def __str__(self) -> str:
        return f"agent {self._line.address}"

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        async with self._connection() as connection:
            headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
            left = await self._in_thread(connection.ask, "GET", self._prefix + key, headers, self._patience)
            if left > length:
                raise Altered(f"{self} begins to send {left} bytes of {key}, and was asked for {length}")
            memory = self._spare.take()
            while left:
                read = await self._in_thread(connection.read_into, memory[: min(left, CHUNK)])
                left -= read
                try:
                    yield memory[:read]
                except BaseException:
                    self._spare.give(memory)
                    raise
            self._spare.give(memory)

    async def size(self, key: str) -> int:
        async with self._connection() as connection:
            return await self._in_thread(connection.ask, "HEAD", self._prefix + key, {}, self._patience)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """One that nobody else uses until the block ends; kept for the next one if all that was asked for has come."""
        connection = self._line.take()
        try:
            yield connection
        finally:
            if connection.is_done:
                self._line.keep(connection)
            else:
                connection.interrupt()
                self._threads.submit(connection.close)

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        except TransferError as error:
            raise type(error)(f"{self}: {error}") from None


class _Line:
    """The connections to one agent."""

    def __init__(self, address: Address, contexts: Callable[[], ssl.SSLContext]) -> None:
        self.address = address
        self._contexts = contexts
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []

    def take(self) -> Connection:
        """One that nobody uses, for one read."""
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = Connection(self.address, self._contexts, self._all.discard)
            self._all.add(connection)
        connection.is_done = False  # from here on, not from when a thread gets to it: it may be given up before that
        return connection

    def keep(self, connection: Connection) -> None:
        self._idle.append(connection)

    def close(self) -> None:
        self._idle.clear()
        for connection in list(self._all):
            connection.interrupt()
            connection.close()
