"""The machine itself as a Place, where the agent is not root: no namespaces, the machine's own network, so one replica for each port.

An engine can be started in it and ended; nothing can be dumped or restored. The engine leads a process group, which ends with the replica;
the kernel ends the engine itself when the agent dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from restore_agent.places.output import Pipes
from restore_agent.places.place import PlaceError, Route
from restore_agent.places.processes import ends_with
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import Fits

_END_SECONDS = 5.0


class Rootless:
    """The Place of a replica where the agent is not root. Use `async with await Rootless.create(port)`, or `close` it."""

    netns = ""  # the agent's own
    route = Route("127.0.0.1")
    root = files = Path("/")
    addresses = ()
    is_ours = True
    gpus = None

    _ports: ClassVar[set[int]] = set()  # in use: a second engine's health check would reach the first

    def __init__(self, port: int) -> None:
        self._port = port
        self.pid = 0
        self._process: asyncio.subprocess.Process | None = None
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._waiting: asyncio.Task[None] | None = None

    @classmethod
    async def create(cls, port: int) -> Rootless:
        """Raises PlaceError: something else listens on that port, or is about to."""
        if port in cls._ports or _listens(port):
            raise PlaceError(f"port {port} is taken, and without root all replicas share it: start the agent as root")
        cls._ports.add(port)
        return cls(port)

    async def __aenter__(self) -> Rootless:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def control_directory(self) -> Path:
        raise _no_snapshots()

    async def checkpoint(self, directory: Path, folder: Path) -> Path:
        return directory  # the machine's

    def output(self, name: str) -> Pipes:
        return Pipes(name)

    async def carried(self, dump: Path) -> dict[str, bytes]:
        raise _no_snapshots()

    def written(self) -> str:
        return ""  # it was written into the machine's own file system

    async def lay_out(self, snapshot: Path) -> None:
        raise _no_snapshots()

    async def complete(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        raise _no_snapshots()

    def compile_caches(self, env: Mapping[str, str]) -> dict[str, Path]:
        raise _no_snapshots()

    def mapped_files(self, host_pids: Iterable[int]) -> set[Path]:
        raise _no_snapshots()

    async def spawn(
        self, command: Sequence[str], env: Mapping[str, str], directory: str, fds: Sequence[int], *, engine: bool = False
    ) -> int:
        """Raises PlaceError: the program or its directory cannot be used."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(env),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=fds[0],
                stderr=fds[1],
                start_new_session=True,
                preexec_fn=functools.partial(_die_with_parent, os.getpid()),
            )
        except OSError as error:
            raise PlaceError(f"cannot start {command[0]}: {error.strerror or error}") from error
        self.pid = self._process.pid
        self._waiting = asyncio.create_task(self._wait(self._process), name=f"waiting for {command[0]}")
        return self.pid

    def exit_of(self, pid: int) -> asyncio.Future[int]:
        return self._exits.setdefault(pid, asyncio.get_running_loop().create_future())

    def host_pids(self) -> dict[int, int]:
        return {self.pid: self.pid} if self.pid else {}

    def host_pid(self, pid: int) -> int | None:
        return self.host_pids().get(pid)

    async def close(self) -> None:
        if self._process is None or self._waiting is None:
            self._ports.discard(self._port)
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            await asyncio.wait([self._waiting], timeout=_END_SECONDS)
        await asyncio.shield(self._waiting)
        self._ports.discard(self._port)

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        future = self.exit_of(process.pid)
        if not future.done():
            future.set_result(-code if code < 0 else code << 8)


def _no_snapshots() -> PlaceError:
    return PlaceError("an engine without a sandbox cannot take part in snapshots; start the agent as root")


def _listens(port: int) -> bool:
    """Whether a program of the machine's has the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


def _die_with_parent(parent: int) -> None:
    if not ends_with(parent, signal.SIGKILL):
        os._exit(1)
