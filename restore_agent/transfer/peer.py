"""Another agent as a source: what peer_server.py serves there.

A peer is asked for one snapshot. For a chunk that has not come to it yet it is waited as long as `patience` says.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from restore_agent.snapshots.chunks import CHUNK
from restore_agent.transfer.line import Line
from restore_agent.transfer.peer_server import AGENT
from restore_agent.transfer.source import Piece, TransferError
from restore_agent.transfer.spare_memory import SpareMemory
from zerowake_shared.address import Address

_THREADS = 64  # reads at the same time, of all peers: many of them wait for chunks to come


class Peers:
    """Other agents, with their connections. Use `with Peers(…)`; leaving it blocks until no thread is left, which is a moment."""

    def __init__(self, contexts: Callable[[], ssl.SSLContext]) -> None:
        """`contexts`: makes the context of the next connection (zerowake_shared.tls.client_contexts)."""
        self._contexts = contexts
        self._threads = ThreadPoolExecutor(_THREADS, "peers")
        self._lines: dict[str, Line] = {}  # by address
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
            line = self._lines[address] = Line(Address.parse(address), AGENT, self._contexts, self._threads, self._spare)
        return Peer(line, f"/{namespace}/{digest}/", patience)


class Peer:
    """One agent as the source of one snapshot."""

    def __init__(self, line: Line, prefix: str, patience: float) -> None:
        self._line = line
        self._prefix = prefix
        self._patience = patience

    def __str__(self) -> str:
        return f"agent {self._line.address}"

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        """See Source."""
        with self._words():
            async with contextlib.aclosing(self._line.read(self._prefix + key, offset, length, self._patience)) as pieces:
                async for piece in pieces:
                    yield piece

    async def size(self, key: str) -> int:
        """See Source."""
        with self._words():
            return await self._line.size(self._prefix + key, self._patience)

    @contextlib.contextmanager
    def _words(self) -> Iterator[None]:
        try:
            yield
        except TransferError as error:
            raise type(error)(f"{self}: {error}") from None
