"""One connection to an HTTP server, another agent or a bucket's: a request at a time over a blocking socket.

What comes is received where it shall lie, a chunk at most in one call. http.client was rejected for it: it reads an encrypted answer
16 KiB at a time through four layers of Python, which cost as much processor time as the decryption.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus

import httptools

from restore_agent.transfer.source import Absent, Denied, Unreachable
from zerowake_shared.address import Address

_PIECE_SECONDS = 0.25  # that a call may take once something has come: who reads wants to see that it goes on
_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 10.0  # nothing comes for so long
_LONGEST_HEAD = 16 << 10
_LONGEST_WORD = 4096  # bytes of what it says is wrong
_LENGTH = re.compile(r"[0-9]{1,18}")


class Connection:
    """Its calls block, but for `interrupt`, and one thread at a time makes them."""

    def __init__(
        self, address: Address, host: str, contexts: Callable[[], ssl.SSLContext | None], closed: Callable[[Connection], None]
    ) -> None:
        """`host`: what the request says of it; its certificate has the name in it. `contexts`: of TLS; None: without."""
        self._address = address
        self._host = host
        self._contexts = contexts
        self._closed = closed
        self._busy = threading.Lock()
        self._interrupted = False
        self.is_done = True  # all that was asked for has come, and the other side keeps the connection
        self._socket: socket.socket | None = None
        self._answer = _Answer()
        self._left = 0  # bytes of the answer that the caller has not got

    def ask(self, method: str, path: str, headers: dict[str, str], patience: float) -> int:
        """Returns how many bytes follow (GET), or there are (HEAD). Raises Absent, Denied, Unreachable."""
        if patience:
            headers = headers | {"Prefer": f"wait={patience:.0f}"}
        lines = (f"{method} {path} HTTP/1.1", f"Host: {self._host}", *(f"{name}: {value}" for name, value in headers.items()), "", "")
        with self._in_use():
            answer = self._answer = self._asked("\r\n".join(lines).encode(), patience)
            length = answer.headers.get("content-length", "")
            if not _LENGTH.fullmatch(length):
                raise Unreachable(f"it does not say how long its answer is ({length[:40]!r}): is it the right server?")
            self._left = 0 if method == "HEAD" else int(length)
            self.is_done = answer.keeps_alive and not self._left
            if answer.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                return int(length)
            said = self._said()
            if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return 0
            if answer.status == HTTPStatus.NOT_FOUND:
                raise Absent(said or "it has no such object")
            if answer.status == HTTPStatus.FORBIDDEN:
                raise Denied(said or "it does not let us")
            raise Unreachable(said or f"it answered {answer.status}")

    def _said(self) -> str:
        """Why it did not do what it was asked for."""
        memory = memoryview(bytearray(min(self._left, _LONGEST_WORD)))
        read = 0
        while read < len(memory):
            read += self._receive(memory[read:])
        return bytes(memory).decode(errors="replace").strip()

    def _asked(self, head: bytes, patience: float) -> _Answer:
        is_kept = self._socket is not None
        try:
            return self._send(head, patience)
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
            if not is_kept or self._interrupted:
                raise
        self._drop()  # the other side has closed it while it was idle
        return self._send(head, patience)

    def _send(self, head: bytes, patience: float) -> _Answer:
        connection = self._socket = self._socket or self._connect()
        connection.settimeout(patience + _SILENT_SECONDS)
        connection.sendall(head)
        answer = _Answer()
        parser, length = httptools.HttpResponseParser(answer), 0
        answer.should_keep_alive = parser.should_keep_alive
        while not answer.is_begun:
            data = connection.recv(_LONGEST_HEAD)
            if not data:
                raise ConnectionResetError("it ended without an answer")
            length += len(data)
            if length - len(answer.body) > _LONGEST_HEAD:
                raise Unreachable("the head of its answer is too long: is it the right server?")
            try:
                parser.feed_data(data)
            except httptools.HttpParserError as error:
                raise Unreachable(f"its answer is none of HTTP's ({error}): is it the right server?") from None
        answer.status = parser.get_status_code()
        connection.settimeout(_SILENT_SECONDS)
        return answer

    def _connect(self) -> socket.socket:
        raw = socket.create_connection(self._address, _CONNECT_SECONDS)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            context = self._contexts()
            return context.wrap_socket(raw, server_hostname=self._host.partition(":")[0]) if context else raw
        except BaseException:
            raw.close()
            raise

    def read_into(self, memory: memoryview) -> int:
        """Fills it with what follows, or as much of it as comes soon, a byte at least: the answer has so many. Raises Unreachable."""
        with self._in_use():
            assert self._socket is not None
            self._socket.settimeout(_SILENT_SECONDS)
            done = self._receive(memory)
            until = time.monotonic() + _PIECE_SECONDS
            with contextlib.suppress(OSError, Unreachable):  # what has come is given; if anything is wrong, the next call says it
                while done < len(memory) and (left := until - time.monotonic()) > 0:
                    self._socket.settimeout(left)
                    done += self._receive(memory[done:])
            self.is_done = self._answer.keeps_alive and not self._left
            return done

    def _receive(self, memory: memoryview) -> int:
        assert self._socket is not None
        if early := self._answer.body[: len(memory)]:  # it came with the head
            memory[: len(early)] = early
            del self._answer.body[: len(early)]
            read = len(early)
        elif not (read := self._socket.recv_into(memory)):
            raise Unreachable("it ended in the middle of an object")
        self._left -= read
        return read

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
            except OSError as error:
                raise Unreachable(f"{error.strerror or error or type(error).__name__}") from None

    def interrupt(self) -> None:
        """Whoever is in a call here gets an error at once, and so does everybody later."""
        self._interrupted = True
        if (connection := self._socket) is not None:
            with contextlib.suppress(OSError):  # not by SSLSocket's own method, which takes the connection apart under its user
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._busy:
            self._drop()
        self._closed(self)

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


class _Answer:
    """What httptools has found."""

    def __init__(self) -> None:
        self.status = 0
        self.keeps_alive = False
        self.should_keep_alive: Callable[[], bool] = lambda: False  # the parser's; it forgets that once a body is complete
        self.headers: dict[str, str] = {}
        self.is_begun = False  # its head is complete
        self.body = bytearray()  # what came with the head

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.is_begun = True
        self.keeps_alive = self.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.body += body
