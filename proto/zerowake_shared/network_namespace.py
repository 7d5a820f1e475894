"""Sockets inside a network namespace, made by a process that stays outside of it.

A socket belongs for its whole life to the namespace in which the calling thread stood when it was made. So the thread goes in and back
again around `socket()` alone (5-9 us), with nothing awaited in between; the socket is then used like any other.
The namespace is held open by a descriptor, since its path mostly goes through a process id, which the kernel gives to another process once
that one has ended.

Where the way back fails, the whole process ends at once with status 70: this thread would open every later connection, the gateway's, the
agent's or the API server's, in a tenant's network. No exception is raised instead, since whoever caught it would go on there.
Rejected: a forwarding process in each namespace (a copy of every byte, one more thing that can die), veth pairs and routes (a network to
run), a thread that stays in each namespace (as many threads as replicas).
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

_CLONE_NEWNET = 0x40000000
_LOST = 70  # exit status
_libc = ctypes.CDLL(None, use_errno=True)


class NetworkNamespace:
    """A network namespace held open: sockets can be made in it until `close`, which `with` calls."""

    def __init__(self, path: str | Path) -> None:
        """Raises: OSError naming the path, if it cannot be opened."""
        self._path = path
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._home)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that lives in the namespace. Raises: OSError (EPERM: the process needs CAP_SYS_ADMIN)."""
        if failed := _enter(self._there):
            raise OSError(failed, f"cannot enter the network namespace {self._path}: {os.strerror(failed)} (it needs CAP_SYS_ADMIN)")
        try:
            return socket.socket(family, kind, protocol)
        finally:
            if failed := _enter(self._home):
                os.write(2, f"ended in the network namespace {self._path}, which cannot be left: {os.strerror(failed)}\n".encode())
                os._exit(_LOST)

    def close(self) -> None:
        """Lets the namespace go; sockets in it stay."""
        os.close(self._there)
        os.close(self._home)


def _enter(descriptor: int) -> int:
    """Moves this thread; returns errno, 0 where it is there. Not os.setns, which Python has from 3.12 on only."""
    return ctypes.get_errno() if _libc.setns(descriptor, _CLONE_NEWNET) else 0
