"""Connections to one replica, made inside its network namespace.

Every replica of a node may have the same address, each in a network namespace of its own: sockets are made there (NetworkNamespace), held
open from the moment the replica is known, and each replica has its own connector, since a connector pools by address.

Closing a session is not enough to end what runs on it: aiohttp lets a connection that is being made go on until its timeout, and one whose
peer does not read stays until the last byte of its buffer is taken, which may be never. So `close` ends the requests themselves, each by a
cancel scope that lasts until the answer's first bytes, and shuts the sockets down, which are ours. Only then is the session closed: a
request that still ran in it would be repeated by aiohttp, on a session that is not there.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakSet

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from zerowake_shared.network_namespace import NetworkNamespace

# Engines close idle connections after as little as 5 s (uvicorn). Ours go first, or a request is sent into one that is being closed.
_IDLE_SECONDS = 4.0
_CONNECT_SECONDS = 5.0
# An unreachable node sends no reset: a connection ends when nothing was acknowledged for this long.
_SILENT_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a replica listens. netns: the path of the network namespace to reach it from; empty: our own."""

    host: str
    port: int
    netns: str = ""


class Upstream:
    """The HTTP session to one replica. Made inside the event loop; `close` ends all its connections and requests."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self._origin = f"http://{host}:{endpoint.port}"
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._waiting: set[asyncio.Timeout] = set()  # a scope for each request without a first byte
        self._quiet = asyncio.Event()  # none of them is left; of use once closing
        self._closing = False
        self._namespace: NetworkNamespace | None = None
        self._unreachable: OSError | None = None
        if endpoint.netns:
            try:
                self._namespace = NetworkNamespace(endpoint.netns)
            except OSError as error:
                # The engine died before it could be used. Whoever follows the agents will hear so; until then no connection can be made.
                self._unreachable = error
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the replica's concurrency is the bound
                keepalive_timeout=_IDLE_SECONDS,
                socket_factory=self._socket,
                happy_eyeballs_delay=None,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            # The request is the client's: nothing of ours is added to it.
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    def _socket(self, address: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        family, kind, protocol, _, _ = address
        if self._unreachable is not None:
            raise OSError(self._unreachable.errno, f"network namespace of the replica: {self._unreachable}")
        made = self._namespace.socket(family, kind, protocol) if self._namespace is not None else socket.socket(family, kind, protocol)
        self._sockets.add(made)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_SECONDS // 3)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT_SECONDS // 3)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_SECONDS * 1000)
        return made

    async def send(
        self, method: str, path: str, headers: CIMultiDict[str], body: bytes | AsyncIterator[bytes] | None
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """Sends a request; returns the answer with its first bytes (none: it has no body). The answer is the caller's to close.

        Raises: aiohttp.ClientError, OSError: the replica failed; ConnectionAbortedError: `close` was called, at whatever stage this was.
        """
        if self._closing:
            raise ConnectionAbortedError("the replica was removed")
        scope = asyncio.timeout(None)
        self._waiting.add(scope)
        try:
            async with scope:
                url = URL(self._origin + path, encoded=True)
                answer = await self._session.request(method, url, headers=headers, data=body, allow_redirects=False)
                try:
                    return answer, await answer.content.readany()
                except BaseException:
                    answer.close()
                    raise
        except TimeoutError:
            if scope.expired():
                raise ConnectionAbortedError("the replica was removed") from None
            raise
        finally:
            self._waiting.discard(scope)
            if not self._waiting:
                self._quiet.set()

    async def probe(self) -> None:
        """Returns when the replica accepts a connection. Raises: OSError or TimeoutError if it does not."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_SECONDS):
            addresses = await loop.getaddrinfo(self.endpoint.host, self.endpoint.port, type=socket.SOCK_STREAM)
            with self._socket(addresses[0]) as made:
                await loop.sock_connect(made, addresses[0][4])

    def close_idle(self) -> None:
        """Closes the connections on which nothing is asked now: a replica that ends is told so that nothing more comes."""
        connector = self._session.connector
        if connector is not None:
            for idle in connector._conns.values():
                for protocol, _ in idle:
                    protocol.close()

    async def close(self) -> None:
        """Ends every request that has no first byte yet, then every connection, those in use as well."""
        self._closing = True
        now = asyncio.get_running_loop().time()
        for scope in self._waiting:
            scope.reschedule(now)
        while self._waiting:
            self._quiet.clear()
            await self._quiet.wait()
        for made in list(self._sockets):
            with suppress(OSError):  # closed already
                made.shutdown(socket.SHUT_RDWR)
        await self._session.close()
        if self._namespace is not None:
            self._namespace.close()
            self._namespace = None
            self._unreachable = OSError("the replica is gone")
