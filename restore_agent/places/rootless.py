"""A cold replica where the agent is not root: no namespaces, the machine's own network, so one replica for each port.

The same calls as a Sandbox as far as a cold start needs them. The engine leads a process group, which ends with the replica; the kernel
ends the engine itself when the agent dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from restore_agent.places.sandbox import SandboxError

_PR_SET_PDEATHSIG = 1
_END_SECONDS = 5.0
_libc = ctypes.CDLL(None)


class Bare:
    netns = ""  # the agent's own
    route = ("127.0.0.1", "")
    root = Path("/")

    _ports: ClassVar[set[int]] = (
        set()
    )  # of those that live or start: a second engine there would pass for healthy by the first one's answers

    def __init__(self, port: int) -> None:
        self._port = port
        self.pid = 0
        self._process: asyncio.subprocess.Process | None = None
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._waiting: asyncio.Task[None] | None = None

    @classmethod
    async def create(cls, port: int) -> Bare:
        """Raises SandboxError: something else listens on that port, or is about to."""
        if port in cls._ports:
            raise SandboxError(f"port {port} is taken, and without root all replicas share it: start the agent as root")
        _check_free(port)
        cls._ports.add(port)
        return cls(port)

    async def __aenter__(self) -> Bare:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def control_directory(self) -> Path:
        raise SandboxError("an engine without a sandbox cannot take part in snapshots; start the agent as root")

    async def spawn(
        self, command: Sequence[str], env: Mapping[str, str], directory: str, fds: Sequence[int], *, engine: bool = False
    ) -> int:
        """Raises SandboxError: the program or its directory cannot be used."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(env),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=fds[0],
                stderr=fds[1],
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            raise SandboxError(f"cannot start {command[0]}: {error.strerror or error}") from error
        self.pid = self._process.pid
        self._waiting = asyncio.create_task(self._wait(self._process), name=f"waiting for {command[0]}")
        return self.pid

    def exit_of(self, pid: int) -> asyncio.Future[int]:
        """The wait status, as of a sandbox."""
        return self._exits.setdefault(pid, asyncio.get_running_loop().create_future())

    def host_pids(self) -> dict[int, int]:
        return {self.pid: self.pid} if self.pid else {}

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


def _check_free(port: int) -> None:
    """Raises SandboxError where another program, maybe another replica, listens on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SandboxError(f"port {port} is taken, and without root all replicas share it: start the agent as root") from error


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
