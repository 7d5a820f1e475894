"""An address at which nothing answers, as on a machine that is cut off: connections to it are begun and never made."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """Yields the port, on 127.0.0.1: a socket that listens, whose line of connections is full, so that the kernel drops what comes."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        yield full.getsockname()[1]
