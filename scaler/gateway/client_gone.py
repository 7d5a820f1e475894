"""Tells clients that have left from clients that have only said all that they have to say.

A client that leaves and one that closes its sending half (`shutdown(SHUT_WR)`, `nc -N`) look alike: an end of file, and nothing more. What
differs is what happens to bytes that are sent to them. A socket that is closed answers with a reset; one that is half closed takes them.
So after an end of file the connection is kept, and watched for the reset by an epoll of our own that asks for nothing else:

- An answer that is being written is itself the question: nothing is to be done.
- Where nothing was written for a while, and no byte of the answer was, the client is sent `100 Continue`: every HTTP/1.1 client passes over
  those before its answer, also where it has not asked for them. It is asked again ever more rarely, since it may leave later.
- Where that is impossible (HTTP/1.0; an answer that has begun and stands still) the client counts as one that has left.

A connection whose body nobody reads, because its request is held, soon is full: an event loop that does not read a socket is not told of
its end either. The kernel knows, and tells an epoll that asks for EPOLLRDHUP. What it cannot see: a client that goes with more unsent than
the connection takes (its end stands behind those bytes until its kernel gives up and resets).

Rejected: an end of file is a departure (curl and OpenAI's clients never close half a connection, but shells, tests and some libraries do,
and got no answer); it is none (the engine goes on for minutes for nobody); it is one if it comes late (an engine that is done before a
client's second system call); TCP's keepalive (a closed socket acknowledges it for a minute); reading bodies ahead.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

GRACE_SECONDS = 0.5
_LAST_PROBE_SECONDS = 15.0
_DEAD = select.EPOLLERR | select.EPOLLHUP


class Connection(Protocol):
    """A client's connection, as it is asked whether there is somebody at its other end."""

    transport: asyncio.Transport | None

    @property
    def written(self) -> int | None:
        """Bytes of an answer that were written; None: nothing is to be answered."""

    def probe(self) -> bool:
        """Sends what a client that has left refuses. False: there is nothing that could be sent."""


class _Watched:
    """One connection: its descriptor, and when it is asked next, once its end of file has come."""

    __slots__ = ("connection", "descriptor", "timer", "transport")

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        self.connection = connection
        self.transport = transport
        self.descriptor: int = transport.get_extra_info("socket").fileno()
        self.timer: asyncio.TimerHandle | None = None


class ClientWatch:
    """Aborts connections whose client has left. Made and closed inside the event loop."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[Connection, _Watched] = {}
        self._numbers: dict[int, _Watched] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._look)

    @contextmanager
    def unread(self, connection: Connection) -> Iterator[None]:
        """Looks, inside the block, for the end of a connection that nobody reads."""
        watched = self._watch(connection, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield
        finally:
            if watched is not None and watched.timer is None:
                self._forget(watched)

    def suspect(self, connection: Connection) -> None:
        """The connection's end of file has come, and there is something to be answered."""
        watched = self._watch(connection, 0)
        if watched is not None and watched.timer is None:
            self._ask_later(watched, GRACE_SECONDS)

    def lost(self, connection: Connection) -> None:
        """The connection is closed: its descriptor may be another's from now on."""
        if watched := self._watched.get(connection):
            self._forget(watched)

    def close(self) -> None:
        for watched in list(self._watched.values()):
            self._forget(watched)
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _watch(self, connection: Connection, events: int) -> _Watched | None:
        transport = connection.transport
        if transport is None or transport.is_closing():
            return None
        watched = self._watched.get(connection)
        if watched is not None:
            self._epoll.modify(watched.descriptor, events)
            return watched
        watched = self._watched[connection] = _Watched(connection, transport)
        self._numbers[watched.descriptor] = watched
        self._epoll.register(watched.descriptor, events)
        return watched

    def _forget(self, watched: _Watched) -> None:
        if watched.timer is not None:
            watched.timer.cancel()
        if self._watched.pop(watched.connection, None) is not None:
            del self._numbers[watched.descriptor]
            with suppress(OSError):  # closed already
                self._epoll.unregister(watched.descriptor)

    def _look(self) -> None:
        for descriptor, events in self._epoll.poll(0):
            watched = self._numbers.get(descriptor)
            if watched is None:
                continue
            if events & _DEAD:
                self._gone(watched)
            else:
                self.suspect(watched.connection)

    def _ask_later(self, watched: _Watched, seconds: float) -> None:
        written = watched.connection.written
        watched.timer = self._loop.call_later(seconds, self._ask, watched, written, seconds)

    def _ask(self, watched: _Watched, before: int | None, seconds: float) -> None:
        written = watched.connection.written
        # Neither of two requests that are answered one after the other is asked about by what was written of the other.
        if written == before and written is not None and not watched.connection.probe():
            self._gone(watched)
        elif written is not None:
            self._ask_later(watched, min(2 * seconds, _LAST_PROBE_SECONDS))

    def _gone(self, watched: _Watched) -> None:
        self._forget(watched)
        watched.transport.abort()
