"""A blocking connection to the server: one request, its answer."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire.errors import PeerGone, from_message
from gpumem.wire.frames import VERSION, Frame, ProtocolViolation, receive, send

DEFAULT_SOCKET = Path("/run/gpumem/gpumem.sock")
ANSWER_SECONDS = 60.0  # for what the server does at once; it may have to make memory


class BlockingConnection:
    """A connection to the server whose calls block: a request, its answer, then the next. Of one thread at a time."""

    def __init__(self, path: Path, label: str) -> None:
        """Raises PeerGone, VersionMismatch."""
        self._path = path
        self._numbers = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.open = True
        try:
            self._socket.settimeout(ANSWER_SECONDS)
            self._socket.connect(str(path))
        except OSError as error:
            self.close()
            raise PeerGone(f"no gpumem answers at {path} ({error}): start one with `gpumem serve --socket {path}`") from error
        reply, _ = self.ask(pb.Request(hello=pb.Hello(version=VERSION, label=label)))
        self.welcome = reply.welcome

    def ask(self, request: pb.Request, descriptors: Sequence[int] = (), seconds: float | None = ANSWER_SECONDS) -> tuple[pb.Reply, Frame]:
        """Sends a request and waits for its answer, whose frame holds the descriptors. Raises PeerGone, and what the server says."""
        if not self.open:
            raise PeerGone(f"the connection to {self._path} is gone; what is mapped stays valid, and resume() attaches again")
        request.id = next(self._numbers)
        try:
            self._socket.settimeout(seconds)
            send(self._socket, request.SerializeToString(), descriptors)
            frame = receive(self._socket)
        except (EOFError, OSError, ProtocolViolation) as error:
            self.close()
            why = "it did not answer" if isinstance(error, TimeoutError) else str(error) or "it closed the connection"
            raise PeerGone(f"gpumem at {self._path} is gone: {why}; what is mapped stays valid, and resume() attaches again") from error
        except BaseException:
            self.close()  # an answer that comes later would be taken for the next one's
            raise
        reply = pb.Reply.FromString(frame.payload)
        if reply.HasField("error"):
            frame.close()
            if not reply.id:
                self.close()
            raise from_message(reply.error)
        return reply, frame

    def close(self) -> None:
        """Ends it, and with it everything that the server lent to it. Twice does nothing."""
        self.open = False
        self._socket.close()
