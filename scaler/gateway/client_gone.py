"""Notices that a client has closed its connection although nobody reads from it.

While a request with a streaming body is held, its connection soon is full: reading stops, and an event loop that does not read a socket
is not told of its end either. The kernel knows, and tells an epoll that asks for EPOLLRDHUP alone. So the connections of held, unread
requests are in an epoll of our own, which is itself a descriptor that the loop watches: no thread, no polling, nothing for the requests
that are read. What it cannot see: a client that goes with more unsent than the connection takes (its end stands behind those bytes until
its kernel gives up and resets). Rejected: reading the body ahead into memory (the bound on held bytes is for bodies that have to be
read), looking at sockets every second.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class ClientWatch:
    """Aborts connections whose client has gone. Made and closed inside the event loop."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, asyncio.Transport] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._look)

    @contextmanager
    def abort_if_gone(self, transport: asyncio.Transport) -> Iterator[None]:
        """Aborts the transport, inside the block, when its peer has closed the connection or its sending half."""
        descriptor: int = transport.get_extra_info("socket").fileno()
        self._watched[descriptor] = transport
        self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield
        finally:
            # After an abort the number may belong to another connection already; the kernel forgot ours when it was closed.
            if self._watched.get(descriptor) is transport:
                del self._watched[descriptor]
                with suppress(OSError):
                    self._epoll.unregister(descriptor)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _look(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            transport = self._watched.get(descriptor)
            if transport is not None:
                transport.abort()
