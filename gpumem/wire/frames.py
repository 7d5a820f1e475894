"""Frames: one protobuf message and its file descriptors over a UNIX seqpacket socket.

A packet is a header (kind, number of descriptors of the whole message, bytes that follow) and those bytes, 64 KiB at most. A message that
does not fit travels in a sealed memfd, the first descriptor of its packet; descriptors that do not fit into one packet (the kernel takes
253) follow in packets that hold nothing else. Every length is checked against what arrived and against a limit before anything is
allocated; a packet that breaks a rule ends the connection, since what comes after it cannot be trusted.

Seqpacket and not a stream: the kernel keeps descriptors beside the bytes that they belong to, and a reader never sees half a message.
Rejected: gRPC (passes no descriptors), one descriptor a packet (a 40 GiB region has forty), messages cut over many packets (a memfd is
one rule instead of reassembly with limits).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

VERSION = 1  # of the protocol: two sides that differ do not talk
PACKET = 64 << 10  # bytes at most, header included
MESSAGE = 16 << 20  # bytes at most of a message that travels in a memfd
DESCRIPTORS = 4096  # at most beside one message
_PACKET_DESCRIPTORS = 253  # the kernel's SCM_MAX_FD
_HEADER = struct.Struct("<BxHI")
_INLINE, _SPILLED, _MORE = 1, 2, 3
_CONTROL = socket.CMSG_SPACE(_PACKET_DESCRIPTORS * array.array("i").itemsize)
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class ProtocolViolation(Exception):
    """The peer sent what no peer of this protocol sends. Close the connection."""


@dataclass
class Frame:
    """A message, and the descriptors that whoever holds it closes."""

    payload: bytes
    descriptors: list[int] = field(default_factory=list)

    def close(self) -> None:
        close_all(self.descriptors)


def close_all(descriptors: list[int]) -> None:
    """Closes descriptors and empties the list, so that none is closed twice."""
    while descriptors:
        os.close(descriptors.pop())


class Assembler:
    """Makes frames out of the packets of one connection."""

    def __init__(self, descriptors: int = DESCRIPTORS) -> None:
        self._limit = descriptors
        self._frame: Frame | None = None
        self._missing = 0

    def receive(self, connection: socket.socket) -> Frame | None:
        """Takes one packet. Returns the frame that it completes, or None if more are to come.

        Raises:
            ProtocolViolation, BlockingIOError, TimeoutError.
            EOFError: the peer has closed.
            OSError: the connection is broken.
        """
        data, control, flags, _ = connection.recvmsg(PACKET, _CONTROL, socket.MSG_CMSG_CLOEXEC)
        arrived = _descriptors_of(control)
        try:
            if not data and not arrived:
                raise EOFError
            if flags & socket.MSG_CTRUNC:
                raise ProtocolViolation("descriptors were lost: this process has too many open files (raise its RLIMIT_NOFILE)")
            return self._accept(data, flags, arrived)
        except BaseException:
            close_all(arrived)
            self.close()
            raise

    def _accept(self, data: bytes, flags: int, arrived: list[int]) -> Frame | None:
        if flags & socket.MSG_TRUNC or len(data) < _HEADER.size:
            raise ProtocolViolation(f"a packet of {len(data)} bytes: shorter than a header, or longer than {PACKET}")
        kind, count, length = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if length != len(body):
            raise ProtocolViolation(f"a packet says that {length} bytes follow, and {len(body)} do")
        if (kind == _MORE) != (self._frame is not None):
            raise ProtocolViolation(
                "a packet out of its turn: descriptors without a message, or a message before the last one's were complete"
            )
        if self._frame is None:
            if kind not in (_INLINE, _SPILLED):
                raise ProtocolViolation(f"a packet of unknown kind {kind}")
            if count > self._limit:
                raise ProtocolViolation(f"{count} descriptors with one message; {self._limit} is the most")
            if kind == _SPILLED:
                body = _read_spilled(arrived)
            self._frame, self._missing = Frame(body), count
        elif body or count or not arrived:
            raise ProtocolViolation("a packet that continues a message holds descriptors and nothing else")
        if len(arrived) > self._missing:
            raise ProtocolViolation(f"{len(arrived)} descriptors, where {self._missing} were to come")
        self._missing -= len(arrived)
        frame = self._frame
        frame.descriptors += arrived
        arrived.clear()
        if self._missing:
            return None
        self._frame = None
        return frame

    def close(self) -> None:
        """Lets go of a message that never became complete."""
        if self._frame is not None:
            self._frame.close()
            self._frame = None


def packets(payload: bytes, descriptors: Sequence[int]) -> list[tuple[bytes, list[int]]]:
    """The packets of a message. The first descriptor of the first is a new one, of the caller's to close, where the message is spilled.

    Raises:
        ValueError: the message is longer than MESSAGE, or has more than DESCRIPTORS descriptors.
    """
    if len(payload) > MESSAGE or len(descriptors) > DESCRIPTORS:
        raise ValueError(f"a message of {len(payload)} bytes and {len(descriptors)} descriptors; {MESSAGE} and {DESCRIPTORS} are the most")
    rest = list(descriptors)
    if _HEADER.size + len(payload) <= PACKET:
        first, rest = rest[:_PACKET_DESCRIPTORS], rest[_PACKET_DESCRIPTORS:]
        made = [(_HEADER.pack(_INLINE, len(descriptors), len(payload)) + payload, first)]
    else:
        first, rest = rest[: _PACKET_DESCRIPTORS - 1], rest[_PACKET_DESCRIPTORS - 1 :]
        made = [(_HEADER.pack(_SPILLED, len(descriptors), 0), [_spill(payload), *first])]
    while rest:
        made.append((_HEADER.pack(_MORE, 0, 0), rest[:_PACKET_DESCRIPTORS]))
        rest = rest[_PACKET_DESCRIPTORS:]
    return made


def send(connection: socket.socket, payload: bytes, descriptors: Sequence[int] = ()) -> None:
    """Sends a message on a blocking socket. Raises OSError (TimeoutError after the socket's own)."""
    made = packets(payload, descriptors)
    try:
        for data, fds in made:
            socket.send_fds(connection, [data], fds)
    finally:
        _close_spilled(made)


def receive(connection: socket.socket) -> Frame:
    """Waits for a message on a blocking socket. Raises as Assembler.receive does."""
    assembler = Assembler()
    try:
        while (frame := assembler.receive(connection)) is None:
            pass
    finally:
        assembler.close()
    return frame


class Channel:
    """Frames to and from one peer, for asyncio programs: a socket, and nothing of what the frames say. One task receives; any may send."""

    def __init__(self, connection: socket.socket, descriptors: int = DESCRIPTORS) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._assembler = Assembler(descriptors)
        self._sending = asyncio.Lock()

    async def receive(self) -> Frame:
        """The next message. Raises ProtocolViolation, EOFError and OSError as Assembler.receive does."""
        while True:
            try:
                frame = self._assembler.receive(self._socket)
            except BlockingIOError:
                await self._ready(asyncio.get_running_loop().add_reader, asyncio.get_running_loop().remove_reader)
            else:
                if frame is not None:
                    return frame

    async def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends a message; the descriptors stay the caller's. Cancelled between two packets of one message, it ends the connection, on
        which nothing else could be understood. Raises OSError."""
        made = packets(payload, descriptors)
        sent = 0
        try:
            async with self._sending:
                for data, fds in made:
                    while True:
                        try:
                            socket.send_fds(self._socket, [data], fds)
                            break
                        except BlockingIOError:
                            await self._ready(asyncio.get_running_loop().add_writer, asyncio.get_running_loop().remove_writer)
                    sent += 1
        except BaseException:
            if 0 < sent < len(made):
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            raise
        finally:
            _close_spilled(made)

    async def _ready(self, add: Callable[..., None], remove: Callable[[socket.socket], bool]) -> None:
        ready = asyncio.Event()
        add(self._socket, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self._socket)

    def close(self) -> None:
        self._assembler.close()
        self._socket.close()


def _descriptors_of(control: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _spill(payload: bytes) -> int:
    fd = os.memfd_create("gpumem-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with contextlib.suppress(InterruptedError):
            done = 0
            while done < len(payload):
                done += os.write(fd, memoryview(payload)[done:])
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _close_spilled(made: list[tuple[bytes, list[int]]]) -> None:
    data, descriptors = made[0]
    if data[0] == _SPILLED:
        os.close(descriptors[0])


def _read_spilled(arrived: list[int]) -> bytes:
    if not arrived:
        raise ProtocolViolation("a message that travels in a memfd came without one")
    fd = arrived.pop(0)
    try:
        # Sealed: the bytes that are checked are the bytes that are used.
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ProtocolViolation("a message travels in a memfd that is not sealed")
        size = os.fstat(fd).st_size
        if size > MESSAGE:
            raise ProtocolViolation(f"a message of {size} bytes; {MESSAGE} is the most")
        data = os.pread(fd, size, 0)
    except OSError as error:
        raise ProtocolViolation(f"a message travels in something that is no memfd: {error}") from None
    finally:
        os.close(fd)
    if len(data) != size:
        raise ProtocolViolation(f"a message of {size} bytes ended after {len(data)}")
    return data
