"""A node's chunks for other nodes: HTTP/1.1 over TLS, on a port of its own.

    GET /<namespace>/<digest>/<key>      key: as in every store (layout.py), of the snapshot with that digest
    Range: bytes=FIRST-LAST              a part of it
    Prefer: wait=SECONDS                 how long it may take to be here, where the snapshot is on its way to this node

Both sides show a certificate of the fleet's authority with the agents' name in it. What may be asked, offers.py says; how much is sent,
egress.py. An answer that is no 200 or 206 says in its text what is wrong.

Each connection has a thread, which reads a file and writes to OpenSSL: both let go of the interpreter's lock. Measured over loopback, two
cores, chunks of 4 MiB, hashed by who reads them: 1.3 to 1.7 GB/s so, 3 without TLS; aiohttp 0.2 (on uvloop 0.7 to 1.1), gRPC 0.5 to 0.8.
asyncio's TLS goes through a buffer in memory, a few kilobytes at a time. Rejected, too: TLS by the kernel, which would let sendfile serve,
as it is a module that many kernels lack and Python has no word for it before 3.12.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, NamedTuple

import httptools

from restore_agent.transfer.egress import Egress
from restore_agent.transfer.offers import Offers
from restore_agent.transfer.source import Absent, Denied, TransferError, Unreachable
from zerowake_shared.address import Address
from zerowake_shared.lack import lack
from zerowake_shared.listening import check_free

AGENT = "zerowake-agent"  # in every agent's certificate: its common name, and a name that it answers to
LONGEST_WAIT = 20.0  # seconds that a reader may wait for a chunk to come
_PIECE = 256 << 10  # bytes between two looks at the bound
_LONGEST_HEAD = 16 << 10
_HANDSHAKE_SECONDS, _HEAD_SECONDS, _SEND_SECONDS, _IDLE_SECONDS = 10.0, 10.0, 30.0, 120.0
_LEAST_SECONDS = 0.001  # of a socket: 0 would mean that it does not block
_PAUSE_SECONDS = 0.1  # after a connection that could not be taken
_CONNECTIONS = 256  # with those that wait for their turn, or for a chunk to come
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")
_WAIT = re.compile(r"wait=(\d{1,6})")
_STATUS = {Absent: HTTPStatus.NOT_FOUND, Denied: HTTPStatus.FORBIDDEN, Unreachable: HTTPStatus.SERVICE_UNAVAILABLE}
_LOG = logging.getLogger("zerowake.agent")


class _Asked(NamedTuple):
    """The head of one request."""

    method: str
    path: str
    headers: dict[str, str]  # names in small letters


class _BadRequest(Exception):
    """It is not understood, and so is nothing that follows."""


class PeerServer:
    """Use `with PeerServer.listening(…)`: serves until the block ends."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext, offers: Offers, egress: Egress) -> None:
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self._context = context
        self._offers = offers
        self._egress = egress
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = False

    @classmethod
    @contextlib.contextmanager
    def listening(cls, address: str, context: ssl.SSLContext, offers: Offers, egress: Egress) -> Iterator[PeerServer]:
        """On HOST:PORT (port 0: any); `context` asks clients for a certificate. Leaving it blocks until no thread is left.

        Raises CannotListen.
        """
        host, port = Address.to_listen(address)
        check_free(address, "the server for other agents")
        family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=64, dualstack_ipv6=not host)
        server = cls(listener, context, offers, egress)
        accepting = threading.Thread(target=server._accept, name="peers")
        accepting.start()
        try:
            yield server
        finally:
            server._close()
            accepting.join()

    def _close(self) -> None:
        self._egress.close()
        with self._lock:
            self._closing = True
            threads = list(self._connections.values())
            for connection in (self._listener, *self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                _not_taken(error)
                time.sleep(_PAUSE_SECONDS)  # it waits in the backlog, and what there is too little of may be there by then
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="peer")
            with self._lock:
                if self._closing or len(self._connections) >= _CONNECTIONS:
                    connection.close()
                    continue
                self._connections[connection] = thread
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                _not_taken(error)
                with self._lock:
                    self._connections.pop(connection)
                connection.close()

    def _serve(self, raw: socket.socket) -> None:
        try:
            raw.settimeout(_HANDSHAKE_SECONDS)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
            try:
                with self._lock:  # the wrapped one has taken the other's descriptor
                    self._connections[connection] = self._connections.pop(raw)
                    raw = connection
                    if self._closing:
                        return
                connection.do_handshake()
                connection.settimeout(_SEND_SECONDS)
                self._answer_all(connection)
            finally:
                connection.close()
        except (OSError, _BadRequest):  # the reader has gone, is no agent, or does not speak with us
            pass
        except Exception:
            _LOG.exception("another agent's request ended by a bug")
        finally:
            with self._lock:
                self._connections.pop(raw)
            raw.close()

    def _answer_all(self, connection: ssl.SSLSocket) -> None:
        requests = _requests(connection)
        stranger = _stranger(connection)
        told = False  # one who is refused a thousand chunks is one line of the log
        while True:
            connection.settimeout(_IDLE_SECONDS)
            asked = next(requests, None)
            if asked is None:
                return
            connection.settimeout(_SEND_SECONDS)
            try:
                if stranger:
                    raise Denied(stranger)
                if not self._answer(connection, asked):
                    return
            except TransferError as error:
                if isinstance(error, Denied) and not told:
                    told = True
                    _LOG.warning("%s is refused %s: %s", connection.getpeername()[0], asked.path, error)
                _say(connection, asked, _STATUS[type(error)], str(error))
                if stranger:
                    return

    def _answer(self, connection: ssl.SSLSocket, asked: _Asked) -> bool:
        """Returns whether the connection goes on. Raises Absent, Denied, Unreachable: nothing has been answered."""
        if asked.method not in ("GET", "HEAD"):
            _say(connection, asked, HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered")
            return False
        with contextlib.ExitStack() as stack:
            size, send = self._found(asked, stack)
            first, last = _part(asked.headers.get("range", ""), size)
            if first > last and size:
                text, more = f"it has {size} bytes", f"Content-Range: bytes */{size}"
                _say(connection, asked, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, text, more)
                return True
            if not stack.enter_context(self._egress.stream(_wait(asked))):
                raise Unreachable(f"this node serves {self._egress.streams} readers already")
            ranged = f"Content-Range: bytes {first}-{last}/{size}" if "range" in asked.headers and size else ""
            _head(connection, HTTPStatus.PARTIAL_CONTENT if ranged else HTTPStatus.OK, last + 1 - first, ranged)
            return asked.method == "HEAD" or send(connection, first, last + 1)

    def _found(self, asked: _Asked, stack: contextlib.ExitStack) -> tuple[int, Callable[[ssl.SSLSocket, int, int], bool]]:
        """The size of what was asked for, and what sends a part of it. Raises Absent, Denied, Unreachable."""
        namespace, _, rest = asked.path.removeprefix("/").partition("/")
        digest, _, key = rest.partition("/")
        found = self._offers.get(namespace, digest).get(key, _wait(asked))
        if isinstance(found, memoryview):
            memory = found
            return len(memory), lambda connection, at, end: self._send_memory(connection, memory[at:end])
        start = found.offset
        try:
            file = stack.enter_context(found.path.open("rb", buffering=0))
        except FileNotFoundError:
            raise Absent(f"{key} of snapshot {digest[:12]} is not on this node any more") from None
        return found.size, lambda connection, at, end: self._send_file(connection, file.fileno(), start + at, start + end)

    def _send_memory(self, connection: ssl.SSLSocket, data: memoryview) -> bool:
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            if not self._egress.take(len(piece)):
                return False
            _send(connection, piece)
        return True

    def _send_file(self, connection: ssl.SSLSocket, file: int, at: int, end: int) -> bool:
        buffer = memoryview(bytearray(min(_PIECE, end - at)))
        while at < end:
            read = os.preadv(file, [buffer[: min(len(buffer), end - at)]], at)
            if not read or not self._egress.take(read):
                return False  # fewer bytes than were promised: the reader sees that the connection ends
            _send(connection, buffer[:read])
            at += read
        return True


def _not_taken(error: BaseException) -> None:
    _LOG.warning("another agent's connection was not taken: %s", lack(error, "the agent") or error)


def _send(connection: ssl.SSLSocket, data: memoryview) -> None:
    """All of a piece within the time that one has. TLS by itself would give each of its records as much. Raises OSError."""
    until = time.monotonic() + _SEND_SECONDS
    while data:
        connection.settimeout(max(_LEAST_SECONDS, until - time.monotonic()))
        data = data[connection.send(data) :]


def _stranger(connection: ssl.SSLSocket) -> str:
    """Why who is there is not served; empty: it is an agent."""
    certificate: dict[str, Any] = dict(connection.getpeercert() or {})
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return "" if AGENT in names else f"agents are served here ({AGENT}); the certificate's name is {', '.join(names) or 'none'}"


def _wait(asked: _Asked) -> float:
    """Seconds that the reader has."""
    found = _WAIT.search(asked.headers.get("prefer", ""))
    return min(float(found[1]), LONGEST_WAIT) if found else 0.0


def _part(ranged: str, size: int) -> tuple[int, int]:
    """First and last byte of what was asked for; a range that is not understood is none, as HTTP has it."""
    if found := _RANGE.fullmatch(ranged):
        return int(found[1]), min(int(found[2]), size - 1)
    return 0, size - 1


def _requests(connection: ssl.SSLSocket) -> Iterator[_Asked]:
    """Until the reader closes. Raises _BadRequest, OSError."""
    while True:
        head = _Head()
        parser, length = httptools.HttpRequestParser(head), 0
        until = float("inf")  # from its first byte on: one that comes byte by byte would hold its thread for hours
        while not head.complete:
            if length:
                connection.settimeout(max(_LEAST_SECONDS, until - time.monotonic()))
            data = connection.recv(4096)
            until = min(until, time.monotonic() + _HEAD_SECONDS)
            length += len(data)
            if not data:
                return
            if length > _LONGEST_HEAD:
                raise _BadRequest("its head is too long")
            try:
                parser.feed_data(data)
            except httptools.HttpParserError as error:
                raise _BadRequest(str(error)) from None
        try:
            yield _Asked(parser.get_method().decode(), head.url.decode(), head.headers)
        except UnicodeDecodeError as error:
            raise _BadRequest(str(error)) from None


class _Head:
    """What httptools has found."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[str, str] = {}
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_message_complete(self) -> None:
        self.complete = True


def _head(connection: ssl.SSLSocket, status: HTTPStatus, length: int, *more: str) -> None:
    lines = (f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Length: {length}", *filter(None, more), "", "")
    connection.sendall("\r\n".join(lines).encode())


def _say(connection: ssl.SSLSocket, asked: _Asked, status: HTTPStatus, text: str, *more: str) -> None:
    body = f"{text}\n".encode()
    _head(connection, status, len(body), "Content-Type: text/plain; charset=utf-8", *more)
    if asked.method != "HEAD":
        connection.sendall(body)
