"""The seam under engines: where one lives, and what a snapshot is restored into, behind the same calls.

    sandbox.py     namespaces of our own, on a machine without Kubernetes
    container.py   a pod's container, whose pid 1 is our placeholder
    rootless.py    the machine itself, where the agent is not root: for engines that are started, not restored

Whoever starts, dumps, restores or ends an engine knows a `Place` only. Which kind it is follows from what the node is and who asked, and
what differs between them is asked of the place itself (`checkpoint`, `is_ours`). Pids are the place's own unless called `host`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from restore_agent.errors import AgentError
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import Fits

CONTROL_DIRECTORY = Path("/run/zerowake/control")  # inside a place: the engine's SNAPSHOT_CONTROL_DIR


class PlaceError(AgentError):
    """A place could not be made or entered, cannot do what was asked of it, or a program could not be started in it."""

    reason = "sandbox-failed"


@dataclass(frozen=True)
class Route:
    """How others reach what listens in a place."""

    host: str
    netns: str = ""  # path of the network namespace in which it has that address; empty: the agent's own


class Output(Protocol):
    """Where an engine prints."""

    name: str  # leads each line of it in the agent's log

    @property
    def keys(self) -> tuple[str, str]:
        """The names that an image knows its stdout and stderr by. Raises PlaceError: no image can carry them."""

    def writers(self) -> AbstractContextManager[list[int]]:
        """The two descriptors to hand to a program, open here until the block ends. Raises PlaceError."""

    def tail(self) -> str:
        """The last lines, each led by a newline; empty: there are none, or another keeps them."""

    def close(self) -> None:
        """Nothing more is read of it."""


class Place(Protocol):
    """Use `async with`, or `close`. One that has ended answers as far as it can: nothing is in it."""

    @property
    def root(self) -> Path:
        """Its file system, as the agent reaches it."""

    @property
    def files(self) -> Path:
        """The file system that mapped files are checked against at a restore: what is left of `root` when it has ended."""

    @property
    def control_directory(self) -> Path:
        """CONTROL_DIRECTORY, as the agent reaches it. Raises PlaceError: there is none."""

    @property
    def netns(self) -> str:
        """Path of its network namespace; empty: the agent's own."""

    @property
    def route(self) -> Route: ...

    @property
    def addresses(self) -> Sequence[str]:
        """That it has in a network beside 127.0.0.1, the first of each version for its engine; empty: none, or the machine's."""

    @property
    def is_ours(self) -> bool:
        """Whether the agent may end it when asked to; else its end is Kubernetes'."""

    @property
    def gpus(self) -> tuple[str, ...] | None:
        """UUIDs of the GPUs that are in it, in CUDA's order; None: all of the machine's."""

    def written(self) -> str:
        """Files, in words, that its engine has written since it was started or restored, and that go with it. Blocks while it lives."""

    async def checkpoint(self, directory: Path, folder: Path) -> Path:
        """Where a checkpoint directory that its engine names can be read for as long as there is a snapshot of it: where it is, or, where
        that goes with the place, a copy that is made at `folder`. Raises PlaceError: it cannot be read, or copied.
        """

    def output(self, name: str) -> Output:
        """Where an engine prints that is to be started or restored in it."""

    async def carried(self, dump: Path) -> dict[str, bytes]:
        """What its engine has changed in its file system: files for a snapshot, by name. `dump`: CRIU's images of it. Raises PlaceError."""

    async def lay_out(self, snapshot: Path) -> None:
        """Writes what `carried` gave, which lies in a snapshot's folder, into this place, as far as CRIU needs it.

        Raises:
            Incompatible: the place is another one than the snapshot needs.
            PlaceError: it cannot be written.
        """

    async def complete(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        """The rest of it, and the comparison of the engine's files: after `lay_out` and before the engine goes on, while CRIU restores it.
        `hashes`: of files that the node knows. Raises Incompatible, PlaceError, as `lay_out`."""

    def compile_caches(self, env: Mapping[str, str]) -> dict[str, Path]:
        """Folders where an engine with this environment, beside what it has from the place, keeps what it compiles, by the variables that
        name them (compile_folders.py), as the agent reaches them; there or not. Raises PlaceError."""

    def mapped_files(self, host_pids: Iterable[int]) -> set[Path]:
        """Files of `files` that these processes map or hold open. Blocks. Raises PlaceError: one of them goes with the place."""

    async def spawn(
        self, command: Sequence[str], env: Mapping[str, str], directory: str, fds: Sequence[int], *, engine: bool = False
    ) -> int:
        """Starts a program and returns its pid; `fds` become its 1, 2, 3, …. `engine`: it is what the place is for. Raises PlaceError."""

    def exit_of(self, pid: int) -> asyncio.Future[int]:
        """The wait status of a process that was started or restored in it, once that has ended."""

    def host_pids(self) -> dict[int, int]:
        """Pid inside → pid on the host, for every process in it. Takes milliseconds where there are hundreds of threads."""

    def host_pid(self, pid: int) -> int | None:
        """That of one process; None: it is not there. At once for the engine's root process."""

    async def close(self) -> None:
        """Ends everything of ours in it. Twice does nothing."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def describe_exit(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def cannot_start(program: Path | str, error: OSError) -> str:
    """Why a program of ours cannot be started, and what to do: it is not there, or the machine has too little of something."""
    if error.errno in (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return f"cannot start {program}: {error}; the agent needs more processes, open files or memory than it may have"
    return f"cannot start {program}: {error}; reinstall zerowake"
