"""The connections to one server, and what is read over them, by blocking sockets in threads (peer_server.py says why).

A connection serves one read at a time and is kept for the next; one whose read was given up in the middle is cut, since what is still on
its way nobody wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from restore_agent.transfer.http_connection import Connection
from restore_agent.transfer.source import Altered
from restore_agent.transfer.spare_memory import SpareMemory
from zerowake_shared.address import Address

_T = TypeVar("_T")


class Line:
    """To one server. `close` blocks until no thread is left in a call, which is a moment."""

    def __init__(
        self, address: Address, host: str, contexts: Callable[[], ssl.SSLContext | None], threads: ThreadPoolExecutor, spare: SpareMemory
    ) -> None:
        """`host`, `contexts`: as Connection takes them. `spare`: for pieces."""
        self.address = address
        self._host = host
        self._contexts = contexts
        self._threads = threads
        self._spare = spare
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []

    async def read(self, path: str, offset: int, length: int, patience: float = 0.0) -> AsyncGenerator[memoryview, None]:
        """As a Source does. It is waited for an answer `patience` seconds longer than usual.

        Raises:
            Absent, Denied, Unreachable: also in the middle. Altered: it begins to send more than it was asked for.
        """
        async with self._connection() as connection:
            left = await self._ask(connection, "GET", path, {"Range": f"bytes={offset}-{offset + length - 1}"}, patience)
            if left > length:
                raise Altered(f"it begins to send {left} bytes, and was asked for {length}")
            memory = self._spare.take()
            while left:
                read = await self._in_thread(connection.read_into, memory[: min(left, len(memory))])
                left -= read
                try:
                    yield memory[:read]
                except BaseException:
                    self._spare.give(memory)
                    raise
            self._spare.give(memory)

    async def size(self, path: str, patience: float = 0.0) -> int:
        """Of an object, bytes. Raises Absent, Denied, Unreachable."""
        async with self._connection() as connection:
            return await self._ask(connection, "HEAD", path, {}, patience)

    def close(self) -> None:
        """Whoever reads gets an error."""
        self._idle.clear()
        for connection in list(self._all):
            connection.interrupt()
            connection.close()

    async def _ask(self, connection: Connection, method: str, path: str, headers: Mapping[str, str], patience: float) -> int:
        return await self._in_thread(connection.ask, method, path, headers, patience)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """One that nobody else uses until the block ends; kept for the next one if all that was asked for has come."""
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = Connection(self.address, self._host, self._contexts, self._all.discard)
            self._all.add(connection)
        connection.is_done = False  # from here on, not from when a thread gets to it: it may be given up before that
        try:
            yield connection
        finally:
            if connection.is_done:
                self._idle.append(connection)
            else:
                connection.interrupt()
                with contextlib.suppress(RuntimeError):  # there are no threads any more: the line was closed, and this with it
                    self._threads.submit(connection.close)

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
