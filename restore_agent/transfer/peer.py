"""Another agent as a source: what peer_server.py serves there, read by blocking sockets in threads (that file says why).

A peer is asked for one snapshot. For a chunk that has not come to it yet it is waited as long as `patience` says. A connection serves one
read at a time and is kept for the next; one whose read was given up in the middle is cut, since what is still on its way nobody wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, TypeVar

from restore_agent.transfer.peer_server import AGENT
from restore_agent.transfer.source import Absent, Altered, Denied, Piece, TransferError, Unreachable
from zerowake_shared.address import Address

_THREADS = 64  # reads at the same time, of all peers: many of them wait for chunks to come
_PIECE = 1 << 20  # bytes: a hop between threads for each of them costs nothing
_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 10.0  # nothing comes for so long
_LENGTH = re.compile(r"[0-9]{1,18}")
_T = TypeVar("_T")


class Peers:
    """Other agents, with their connections. Use `with Peers(…)`; leaving it blocks until no thread is left, which is a moment."""

    def __init__(self, contexts: Callable[[], ssl.SSLContext]) -> None:
        """`contexts`: makes the context of the next connection (zerowake_shared.tls.client_contexts)."""
        self._contexts = contexts
        self._threads = ThreadPoolExecutor(_THREADS, "peers")
        self._lines: dict[str, _Line] = {}  # by address

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
        return Peer(line, self._threads, f"/{namespace}/{digest}/", patience)


class Peer:
    """One agent as the source of one snapshot."""

    def __init__(self, line: _Line, threads: ThreadPoolExecutor, prefix: str, patience: float) -> None:
        self._line = line
        self._threads = threads
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
            buffer = memoryview(bytearray(min(left, _PIECE)))
            while left:
                read = await self._in_thread(connection.read_into, buffer[: min(left, _PIECE)])
                left -= read
                yield buffer[:read]

    async def size(self, key: str) -> int:
        async with self._connection() as connection:
            return await self._in_thread(connection.ask, "HEAD", self._prefix + key, {}, self._patience)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[_Connection]:
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
        self._all: set[_Connection] = set()
        self._idle: list[_Connection] = []

    def take(self) -> _Connection:
        """One that nobody uses, for one read."""
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = _Connection(self.address, self._contexts, self._all.discard)
            self._all.add(connection)
        connection.is_done = False  # from here on, not from when a thread gets to it: it may be given up before that
        return connection

    def keep(self, connection: _Connection) -> None:
        self._idle.append(connection)

    def close(self) -> None:
        self._idle.clear()
        for connection in list(self._all):
            connection.interrupt()
            connection.close()


class _Connection:
    """One connection. Its calls block, but for `interrupt`, and one thread at a time makes them."""

    def __init__(self, address: Address, contexts: Callable[[], ssl.SSLContext], closed: Callable[[_Connection], None]) -> None:
        self._address = address
        self._contexts = contexts
        self._closed = closed
        self._busy = threading.Lock()
        self._interrupted = False
        self.is_done = True  # all that was asked for has come, and the other side keeps the connection
        self._http: http.client.HTTPConnection | None = None
        self._answer: http.client.HTTPResponse | None = None

    def ask(self, method: str, path: str, headers: dict[str, str], patience: float) -> int:
        """Returns how many bytes follow (GET), or there are (HEAD). Raises Absent, Denied, Unreachable."""
        if patience:
            headers = headers | {"Prefer": f"wait={patience:.0f}"}
        with self._in_use():
            answer = self._answer = self._asked(method, path, headers, patience)
            if answer.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                self.is_done = answer.isclosed()
                length = answer.headers["Content-Length"] or ""
                if not _LENGTH.fullmatch(length):
                    self.is_done = False
                    raise Unreachable(f"it does not say how long its answer is ({length[:40]!r}): is there an agent?")
                return int(length)
            said = answer.read(4096).decode(errors="replace").strip()
            self.is_done = answer.isclosed()
            if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return 0
            if answer.status == HTTPStatus.NOT_FOUND:
                raise Absent(said or "it has no such object")
            if answer.status == HTTPStatus.FORBIDDEN:
                raise Denied(said or "it does not let us")
            raise Unreachable(said or f"it answered {answer.status}")

    def _asked(self, method: str, path: str, headers: dict[str, str], patience: float) -> http.client.HTTPResponse:
        is_kept = self._http is not None
        try:
            return self._send(method, path, headers, patience)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
            if not is_kept or self._interrupted:
                raise
        self._drop()  # the other side has closed it while it was idle
        return self._send(method, path, headers, patience)

    def _send(self, method: str, path: str, headers: dict[str, str], patience: float) -> http.client.HTTPResponse:
        connection = self._http = self._http or self._connect()
        assert connection.sock is not None
        connection.sock.settimeout(patience + _SILENT_SECONDS)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        if connection.sock is not None:
            connection.sock.settimeout(_SILENT_SECONDS)
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        raw = socket.create_connection(self._address, _CONNECT_SECONDS)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wrapped = self._contexts().wrap_socket(raw, server_hostname=AGENT)
        except BaseException:
            raw.close()
            raise
        connection = http.client.HTTPConnection(str(self._address))
        connection.sock = wrapped
        return connection

    def read_into(self, buffer: memoryview) -> int:
        """At least one byte. Raises Unreachable."""
        assert self._answer is not None
        with self._in_use():
            done = 0
            while done < len(buffer):
                if not (read := self._answer.readinto(buffer[done:])):
                    raise Unreachable("it ended in the middle of an object")
                done += read
            self.is_done = self._answer.isclosed()
            return done

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """Raises Unreachable, Denied for what sockets raise."""
        with self._busy:
            try:
                if self._interrupted:
                    raise Unreachable("it was given up")
                yield
            except ssl.SSLCertVerificationError as error:
                raise Denied(f"its certificate is none of the fleet's ({error.verify_message}); renew it, or our ca.crt") from None
            except ssl.SSLError as error:
                if "ALERT" in (error.reason or ""):
                    raise Denied(f"it does not take our certificate ({error.reason}); renew it, or the other's ca.crt") from None
                raise Unreachable(f"its TLS broke off: {error.reason or error}") from None
            except TimeoutError:
                raise Unreachable("nothing came of it in time; is the node overloaded, or its network cut?") from None
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable(f"{getattr(error, 'strerror', None) or error or type(error).__name__}") from None

    def interrupt(self) -> None:
        """Whoever is in a call here gets an error at once, and so does everybody later."""
        self._interrupted = True
        if self._http is not None and isinstance(self._http.sock, socket.socket):
            with contextlib.suppress(OSError):  # not by SSLSocket's own method, which takes the connection apart under its user
                socket.socket.shutdown(self._http.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._busy:
            self._drop()
        self._closed(self)

    def _drop(self) -> None:
        if self._answer is not None:
            self._answer.close()
        if self._http is not None:
            self._http.close()
        self._http = self._answer = None
