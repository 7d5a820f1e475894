"""The server: holds memory ahead of need and lends it. It makes no CUDA context, and copies nothing itself.

Who somebody is follows from the socket they could connect to. The operator's is for the server's own user and root. Each namespace has a
socket in a folder of its own, `tenants/NAMESPACE/gpumem.sock` beside the operator's; whoever runs a tenant mounts that one folder into
its sandbox. Names and secrets that a process shows were rejected: they would lie in its environment, and in its snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
import socket
import stat
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.arena import Arena
from gpumem.filler.foreman import Foreman
from gpumem.hardware.memory import Memory
from gpumem.server.connection import Connection
from gpumem.server.device import Device
from gpumem.server.filling import Filling
from gpumem.server.status import status_of
from gpumem.wire.errors import GpumemError, Invalid
from gpumem.wire.frames import Channel
from zerowake_shared.background import kept

SOCKET = "gpumem.sock"
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CREDENTIALS = struct.Struct("3i")
_LONGEST_PATH = 107  # of a socket; the kernel's limit
_DESCRIPTORS = 1024  # a client may send with one message
_CONNECTIONS = 1024  # of one namespace at once, so that none takes the server's last descriptors

logger = logging.getLogger(__name__)


class ServerBusy(GpumemError):
    """Another server has this socket."""


class Server:
    """Its sockets, and behind them everything that one machine lends: devices, their fillers, the arena."""

    def __init__(self, path: Path, memories: Mapping[str, Memory], arena: Arena, floor: int) -> None:
        """
        Args:
            path: the operator's socket.
            floor: bytes of each device that stay free for others.
        """
        self._path = path.absolute()
        self._floor = floor
        self.arena = arena
        self.devices = {identity: Device(memory) for identity, memory in memories.items()}
        self.foremen = {identity: Foreman(identity, arena) for identity in memories}
        self.filling = Filling(self.devices, self.foremen, arena)
        self._connections: set[asyncio.Task[None]] = set()
        self._open: Counter[str] = Counter()  # connections by namespace
        self._listeners: dict[str, asyncio.Task[None]] = {}  # by namespace
        self._spare = -1  # a descriptor that is given up to accept, and hang up on, a client when there are no others

    @contextlib.asynccontextmanager
    async def serving(self, reserve: Mapping[str, int]) -> AsyncIterator[None]:
        """Takes the memory, then listens, until the block ends. `reserve`: bytes to hold, by device.

        Raises:
            ServerBusy; DeviceFull: there is not enough memory for the arena.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(_only_server(self._path))
            await asyncio.to_thread(self.arena.open)
            stack.callback(self.arena.close)
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(self._close_spare)
            for device in self.devices.values():
                stack.callback(device.pool.close)
                await self.resize(device, reserve.get(device.identity, 0))
            work = [(device.pool.replenish, f"memory of {device.identity}") for device in self.devices.values()]
            work += [(foreman.run, f"filler of {foreman.identity}") for foreman in self.foremen.values()]
            background = [asyncio.create_task(kept(each, name, logger), name=name) for each, name in work]
            stack.push_async_callback(self.filling.close)  # runs after the fillers have ended: nothing is written by then
            stack.push_async_callback(_end, background)
            stack.push_async_callback(self._hang_up)
            self._listen("", self._path)
            for folder in (self._path.parent / "tenants").glob("*/"):
                if _NAMESPACE.fullmatch(folder.name):
                    self.open_tenant(folder.name)
            yield

    async def _hang_up(self) -> None:
        await _end(list(self._listeners.values()))
        await _end(list(self._connections))
        self._path.unlink(missing_ok=True)

    def _listen(self, namespace: str, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        fresh = _fresh(path)
        fresh.unlink(missing_ok=True)
        listener.bind(str(fresh))
        # A tenant may be any user: who reaches its folder is the tenant.
        fresh.chmod(0o666 if namespace else 0o600)
        listener.listen(1024)
        fresh.replace(path)
        self._listeners[namespace] = asyncio.create_task(self._listening(listener, namespace))

    async def _listening(self, listener: socket.socket, namespace: str) -> None:
        with listener:
            await kept(functools.partial(self._accept, listener, namespace), f"clients of {namespace or 'the machine'}", logger)

    async def _accept(self, listener: socket.socket, namespace: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.error("a client cannot be served: %s (raise the limit of open files)", error)
                await self._turn_away(listener)
                continue
            if namespace and self._open[namespace] >= _CONNECTIONS:
                connection.close()
                continue
            task = asyncio.create_task(self._serve(connection, namespace))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _turn_away(self, listener: socket.socket) -> None:
        """Hangs up on one client with the descriptor that is kept for it; it would wait for ever otherwise, and we would spin."""
        self._close_spare()
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        await asyncio.sleep(0)

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    async def _serve(self, connection: socket.socket, namespace: str) -> None:
        pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if not namespace and uid not in (0, os.geteuid()):
            logger.warning("pid %d of user %d is not the operator", pid, uid)
            connection.close()
            return
        self._open[namespace] += 1
        try:
            await Connection(self, Channel(connection, _DESCRIPTORS), namespace, pid).run()
        finally:
            self._open[namespace] -= 1

    # What connections ask for

    async def resize(self, device: Device, wanted: int) -> int:
        """Holds `wanted` bytes of a device, or what leaves the floor. Returns the bytes held."""
        free, total = await asyncio.to_thread(device.memory.free)
        ours = device.pool.free + device.pool.lent
        possible = max(0, min(ours + free, total) - self._floor)
        if wanted > possible:
            logger.warning(
                "%s: %d bytes were to be held, of which %d can be with %d left free", device.identity, wanted, possible, self._floor
            )
        return await device.resize(min(wanted, possible))

    def open_tenant(self, namespace: str) -> str:
        """Raises Invalid: it is no namespace's name, or too long beside this server's own path."""
        if not _NAMESPACE.fullmatch(namespace):
            raise Invalid(f"namespace {namespace!r}: lower-case letters, digits and dashes, 63 at most, as in Kubernetes")
        tenants = self._path.parent / "tenants"
        path = tenants / namespace / SOCKET
        if too_long := _too_long(path):
            raise Invalid(f"{path} would be {too_long}: start gpumem with a --socket in a shorter folder")
        if namespace not in self._listeners:
            tenants.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o755, exist_ok=True)
            self._listen(namespace, path)
        return str(path)

    def set_quota(self, namespace: str, size: int) -> None:
        for device in self.devices.values():
            device.quotas[namespace] = size

    def status(self, namespace: str | None) -> pb.Status:
        status = status_of(self.devices, self.arena, self.filling.jobs, namespace)
        status.connections = len(self._connections)
        for device in status.devices:
            device.filler_pid = self.foremen[device.identity].pid
            device.filler_restarts = self.foremen[device.identity].restarts
        return status


def _fresh(path: Path) -> Path:
    """Where a socket is made, to be put in its place when it listens."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextlib.contextmanager
def _only_server(path: Path) -> Iterator[None]:
    """Makes sure that there is no other server behind a socket, and nothing else at its path. Raises ServerBusy."""
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 20).decode(errors="replace")
            raise ServerBusy(f"another gpumem serves {path}{f', pid {pid}' if pid else ''}: end it, or choose another --socket") from None
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        if why := _not_ours(path):
            raise ServerBusy(f"{path} is {why}: choose another --socket")
        yield
    finally:
        os.close(lock)


def _not_ours(path: Path) -> str:
    """Why a server cannot be there; empty: nothing is, or what a killed one left."""
    if too_long := _too_long(path):
        return too_long
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return "no socket"
    except FileNotFoundError:
        return ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        refused = probe.connect_ex(str(path))
    return "" if refused == errno.ECONNREFUSED else "another program's socket, which listens"


def _too_long(path: Path) -> str:
    """By how much; empty: it is not."""
    over = len(os.fsencode(_fresh(path))) - _LONGEST_PATH
    return f"too long for a socket by {over} bytes" if over > 0 else ""


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
