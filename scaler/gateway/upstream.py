"""Connections to one replica, made inside its network namespace: an HTTP/1.1 client for a proxy.

Every replica of a node may have the same address, each in a network namespace of its own: sockets are made there (NetworkNamespace), held
open from the moment the replica is known. Requests and answers go through as bytes (connection, answer_parser); here it is decided which
connection a request takes, and when it is sent a second time to the same replica.

A pooled connection may be closed by the engine at any moment. It is looked at before it is used, and if it ends all the same before
anything of the request came to the engine, a request that is held whole goes out again on a new one; an upload cannot, so it always has a
connection of its own. What may have come to the engine is not sent again here: it may have been executed, or be what ended the engine.
`close` ends every connection where it stands, and whoever waits on one hears of it in the same turn of the event loop.

Rejected: aiohttp's client (readers that are never told of an end, bounds that cannot be told from a dead replica, fields that are decoded
and lose bytes, more than half of the gateway's processor time), httpx and h11 (several times slower still).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass

from scaler.gateway.answer_parser import Head
from scaler.gateway.connection import Connection
from zerowake_shared.lack import passes
from zerowake_shared.network_namespace import NetworkNamespace

# Engines close idle connections after as little as 5 s (uvicorn). Ours go first, or a request is sent into one that is being closed.
_IDLE_SECONDS = 4.0
_MARGIN = 0.75  # of the time after which an engine was seen to close one
_CONNECT_SECONDS = 5.0
# An unreachable node sends no reset: a connection ends when nothing was acknowledged for this long.
_SILENT_SECONDS = 30


class NotReached(ConnectionError):
    """Nothing of a request has come to the replica: it can be sent to another one, whatever it is."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a replica listens. netns: the path of the network namespace to reach it from; empty: our own."""

    host: str
    port: int
    netns: str = ""


class Upstream:
    """The connections to one replica. Made inside the event loop; `close` ends all of them, and the requests on them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self.host = f"{host}:{endpoint.port}".encode()  # as a request names it
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._idle: list[tuple[Connection, float]] = []  # and since when; the last one is taken first
        self._sweep: asyncio.TimerHandle | None = None  # there is one while any is idle
        self._idle_seconds = _IDLE_SECONDS
        self._connecting: set[asyncio.Timeout] = set()
        self._closing = False
        self._namespace: NetworkNamespace | None = None
        self._unreachable: OSError | None = None
        if endpoint.netns:
            self._hold_namespace()

    async def send(
        self,
        method: bytes,
        request: bytes,
        body: AsyncIterable[bytes] | None = None,
        *,
        repeatable: bool = True,
        upgrades: bool = False,
        hint: Callable[[Head], None] | None = None,
    ) -> Connection:
        """Sends a request; returns its connection when the answer has begun. The caller gives it back (`give_back`).

        request: from its first line to the end of what is sent at once; body: what follows that; repeatable: the body can be iterated
        again; upgrades: another protocol is asked for; hint: is given informational answers.
        Raises: NotReached: nothing of it came to the replica; OSError: the replica failed at it; ConnectionAbortedError: `close` was called
        meanwhile; BadAnswer; whatever `body` raises.
        """
        connection = self._pooled() if repeatable and not upgrades else None
        made = connection is None
        while True:
            if connection is None:
                try:
                    connection = await self._connect()
                except OSError as error:
                    raise NotReached(error) from error
            try:
                await connection.ask(method, request, body, upgrades=upgrades, hint=hint)
                return connection
            except ConnectionError as error:
                connection.end(error)
                if made or not connection.untouched or self._closing or isinstance(error, ConnectionAbortedError):
                    await connection.stop_upload()
                    if connection.untouched and repeatable and not self._closing:
                        raise NotReached(error) from error
                    raise
                connection, made = None, True  # the engine closed it when the request was on its way
            except BaseException as error:
                connection.end(ConnectionResetError("the request was given up"))
                if isinstance(error, Exception):
                    await connection.stop_upload()
                raise

    def give_back(self, connection: Connection) -> None:
        """The answer has been passed on, or nobody wants it any more."""
        if not connection.free or self._closing:
            connection.end(ConnectionResetError("the answer was given up"))
            return
        self._idle.append((connection, self._loop.time()))
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._idle_seconds, self._end_idle)

    async def probe(self) -> None:
        """Returns when the replica accepts a connection. Raises: OSError or TimeoutError if it does not."""
        made = await self._connected()
        made.close()

    def close_idle(self) -> None:
        """Ends the connections on which nothing is asked now: a replica that ends is told so that nothing more comes."""
        idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.end(ConnectionResetError("the connection is needed no more"))

    def give_up(self) -> None:
        """Ends the requests whose answers have not begun: the replica answers nothing any more, or only what it has begun to."""
        for connection in [each for each in self._connections if each.waits]:
            connection.end(ConnectionAbortedError("the replica does not answer its health check"))

    async def close(self) -> None:
        """Ends every connection, those in use as well, and those that are being made."""
        self._closing = True
        removed = ConnectionAbortedError("the replica was removed")
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for scope in self._connecting:
            if not scope.expired():  # one that expires in this turn of the loop takes no other time
                scope.reschedule(self._loop.time())
        for connection in list(self._connections):
            connection.end(removed)
        if self._namespace is not None:
            self._namespace.close()
            self._namespace = None
            self._unreachable = OSError("the replica is gone")

    def _pooled(self) -> Connection | None:
        """An idle connection that is fit for a request."""
        now = self._loop.time()
        while self._idle:
            connection, since = self._idle.pop()
            if not connection.usable:
                self._closes_after(now - since)
            elif now - since <= self._idle_seconds:
                return connection
            connection.end(ConnectionResetError("the engine closed an idle connection"))
        return None

    def _end_idle(self) -> None:
        self._sweep = None
        old = self._loop.time() - self._idle_seconds
        kept = [(connection, since) for connection, since in self._idle if since > old]
        ended = [connection for connection, since in self._idle if since <= old]
        self._idle = kept
        for connection in ended:
            connection.end(ConnectionResetError("the connection was idle for too long"))
        if kept:
            self._sweep = self._loop.call_at(kept[0][1] + self._idle_seconds, self._end_idle)

    def _ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        for idle, since in self._idle:
            if idle is connection:
                self._closes_after(self._loop.time() - since)
        self._idle = [(idle, since) for idle, since in self._idle if idle is not connection]

    def _closes_after(self, seconds: float) -> None:
        """The engine has closed an idle connection, sooner than others do: from now on ours go before that."""
        self._idle_seconds = min(self._idle_seconds, _MARGIN * seconds)
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = self._loop.call_later(self._idle_seconds, self._end_idle)

    async def _connect(self) -> Connection:
        made = await self._connected()
        connection = Connection(made, self._ended)
        try:
            await self._loop.create_connection(lambda: connection, sock=made)
        except BaseException:
            made.close()
            raise
        self._connections.add(connection)
        if self._closing:
            connection.end(ConnectionAbortedError("the replica was removed"))
        return connection

    async def _connected(self) -> socket.socket:
        """A socket that is connected to the replica. Raises: OSError, TimeoutError; ConnectionAbortedError: the replica was removed."""
        if self._closing:
            raise ConnectionAbortedError("the replica was removed")
        try:
            async with asyncio.timeout(_CONNECT_SECONDS) as scope:
                self._connecting.add(scope)
                try:
                    return await self._try_addresses()
                finally:
                    self._connecting.discard(scope)
        except TimeoutError:
            if self._closing:
                raise ConnectionAbortedError("the replica was removed") from None
            raise TimeoutError(f"no connection to {self.endpoint.host}:{self.endpoint.port} within {_CONNECT_SECONDS:g} s") from None

    async def _try_addresses(self) -> socket.socket:
        host, port = self.endpoint.host, self.endpoint.port
        failed: OSError | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)  # asks nobody
        except socket.gaierror:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            made = self._socket(family, kind, protocol)
            try:
                await self._loop.sock_connect(made, address)
                return made
            except OSError as error:
                made.close()
                failed = error
            except BaseException:
                made.close()
                raise
        raise failed or OSError(f"{host} has no address")

    def _hold_namespace(self) -> None:
        try:
            self._namespace, self._unreachable = NetworkNamespace(self.endpoint.netns), None
        except OSError as error:
            # The engine died before it could be used, of which whoever follows the agents will hear; or we had no descriptor left.
            self._unreachable = error

    def _socket(self, family: int, kind: int, protocol: int) -> socket.socket:
        if passes(self._unreachable):
            self._hold_namespace()  # what there was too little of may be there again, and the replica is as good as it was
        if self._unreachable is not None:
            raise OSError(self._unreachable.errno, f"network namespace of the replica: {self._unreachable}")
        made = self._namespace.socket(family, kind, protocol) if self._namespace is not None else socket.socket(family, kind, protocol)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_SECONDS // 3)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT_SECONDS // 3)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_SECONDS * 1000)
        return made
