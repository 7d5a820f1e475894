"""A running container, held by a placeholder, as a Place.

A container belongs to a tenant, so what a sandbox may take for granted is guarded here:
- Programs of ours run inside it with the agent's rights (join.c): in its cgroups and namespaces, as children of its pid 1, executed by a
  descriptor and linked statically, so that nothing of the container's file system runs with them.
- Its files are reached through copies of its mounts on which no symbolic link is followed (container_views.py). What an engine has changed
  among them is carried with its snapshot (container_contents.py).
- Its stdout and stderr stay the runtime's: logs go where they always went, and an agent that ends takes no pipe away from an engine.
Its life is not ours: `close` ends what we put in as long as it was not `keep`-ed, and never the container.
Rejected: CRIU making or joining namespaces by itself (it knows no pid namespace to join, and would run from the container's files), and a
privileged container beside the engine in each pod (its tenant's template would decide over it).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from restore_agent.places import joining
from restore_agent.places.acting_as import User
from restore_agent.places.cgroups import OutOfSight, cgroup_files
from restore_agent.places.compile_folders import compile_folders
from restore_agent.places.container_contents import ContainerContents
from restore_agent.places.container_error import ContainerError, ContainerRefused
from restore_agent.places.container_views import ContainerViews
from restore_agent.places.isolation import NotIsolated, check_isolated
from restore_agent.places.place import Route
from restore_agent.places.placeholder import Placeholder, PlaceholderError
from restore_agent.places.processes import descendant, descendants, taken_over
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import Fits

_END_SECONDS = 10.0
_GOING_SECONDS = 1.0
_LAST_WORDS_SECONDS = 2.0
_PAUSE = 0.002


class ContainerOutput:
    """An Output: the container's own stdout and stderr, in the place of pipes of the agent's (output.py)."""

    def __init__(self, name: str, placeholder: Placeholder) -> None:
        self.name = name
        self._placeholder = placeholder

    @property
    def keys(self) -> tuple[str, str]:
        """Raises ContainerError: they are no pipes."""
        one, two = (str(Path(f"/proc/{self._placeholder.pid}/fd/{fd}").readlink()) for fd in (1, 2))
        for key in (one, two):
            if not key.startswith("pipe:["):
                raise ContainerRefused(f"the container's output goes to {key}, which no image can carry; set tty: false in its pod")
        return one, two

    @contextlib.contextmanager
    def writers(self) -> Iterator[list[int]]:
        """Raises ContainerError: they cannot be taken over."""
        fds: list[int] = []
        try:
            for fd in (1, 2):
                try:
                    fds.append(taken_over(self._placeholder.pidfd, fd))
                except OSError as error:
                    raise ContainerError(f"cannot take over the container's output: {error.strerror}") from None
            yield fds
        finally:
            for fd in fds:
                os.close(fd)

    def tail(self) -> str:
        return ""  # its log is the kubelet's

    def close(self) -> None:
        """Nothing of it is held."""


class Container:
    """The Place of a replica in a pod. `open` it, then use it with `async with`, and `keep` it where the engine shall outlive the block."""

    is_ours = False

    def __init__(
        self,
        placeholder: Placeholder,
        image: str,
        addresses: Sequence[str],
        volatile: Sequence[str] = (),
        shared: Sequence[str] = (),
        *,
        asked: Mapping[str, Any] = MappingProxyType({}),
        stale_allowed: bool = False,
    ) -> None:
        """`image`: by digest. `addresses`: the pod's, of which the first is its engine's. `volatile`: where volumes are mounted that end
        with the pod. `shared`: those of them that other containers of the pod have, too; what lies in the others is the engine's alone, and
        is carried with its snapshot. `asked`: the container as its pod wants it. `stale_allowed`: an engine may keep what it knows of the
        pod that it was captured in, though this pod asks for its own."""
        self.placeholder = placeholder
        self.addresses = addresses
        self.pid = placeholder.pid
        self.views = ContainerViews(placeholder)
        self.contents = ContainerContents(self.pid, self.views, image, volatile, shared, asked, stale_allowed=stale_allowed)
        self.grace = 30.0  # seconds from its being asked to end to its being killed
        self.probed: frozenset[str] = frozenset()  # what the kubelet's probes ask its port for; to be answered while its engine sleeps
        self.unanswerable = ""  # why its probes cannot be answered then; empty: they can
        self.gpus: tuple[str, ...] | None = None  # that it was given, once that is known
        self._kept = False

    async def open(self) -> Container:
        """Checks that it is isolated, empties it and opens its file system; again before each restore into it. Raises ContainerError."""
        try:
            check_isolated(self.pid)
        except NotIsolated as error:
            raise ContainerError(str(error)) from None
        await self.empty()  # of what an agent that was killed has left half restored
        await self.views.open()
        for word in self.control_directory.iterdir():  # said to or by an engine that was here before
            word.unlink()
        return self

    async def __aenter__(self) -> Container:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.close())

    @property
    def route(self) -> Route:
        """The pod's address, in the cluster's network."""
        return Route(next(iter(self.addresses), ""))

    @property
    def netns(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    @property
    def root(self) -> Path:
        return self.views.root

    @property
    def files(self) -> Path:
        return self.views.root

    @property
    def control_directory(self) -> Path:
        return self.views.control_directory

    def output(self, name: str) -> ContainerOutput:
        return ContainerOutput(name, self.placeholder)

    async def carried(self, dump: Path) -> dict[str, bytes]:
        """The changes since its image. Raises ContainerError."""
        return await self.contents.carried(dump)

    def written(self) -> str:
        return ""  # that it goes with the container is how Kubernetes does it

    async def checkpoint(self, directory: Path, folder: Path) -> Path:
        return await self.contents.checkpoint(directory, folder)

    async def lay_out(self, snapshot: Path) -> None:
        """`close` undoes it unless the container was kept."""
        await self.contents.lay_out(snapshot)

    async def complete(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        await self.contents.complete(snapshot, fits, hashes)

    @property
    def user(self) -> User:
        """Whom its command runs as. Raises ContainerError."""
        return self.contents.user()

    def compile_caches(self, env: Mapping[str, str]) -> dict[str, Path]:
        """What is reached by a link is not: none is followed in a container."""
        folders = compile_folders({**self.environment(), **env}, self.user.name or str(self.user.uid), os.path.normpath)
        return {variable: self.root / path.lstrip("/") for variable, path in folders.items()}

    def mapped_files(self, host_pids: Iterable[int]) -> set[Path]:
        """Raises ContainerRefused: one of them is gone with the pod."""
        return self.contents.mapped_files(host_pids)

    def environment(self) -> dict[str, str]:
        """Of its first process, which the runtime gave it. Raises ContainerError."""
        return self.contents.environment()

    async def spawn(
        self, command: Sequence[str], env: Mapping[str, str], directory: str, fds: Sequence[int], *, engine: bool = False
    ) -> int:
        """Starts a program of the node's; `fds` become its 1, 2, 3, … An engine is started by the placeholder instead, as the container
        would have: with its own environment, directory, output and rights.

        Returns its pid inside.

        Raises:
            ContainerError: the program is linked dynamically, or the container has ended.
        """
        if engine:
            try:
                return await self.placeholder.start(command, env)
            except PlaceholderError as error:
                raise ContainerError(str(error)) from None
        try:
            joining.check_static(command[0])
        except joining.JoinFailed as error:
            raise ContainerError(str(error)) from None
        with contextlib.ExitStack() as opened:
            program = opened.enter_context(_descriptor(command[0], os.O_RDONLY))
            try:
                cgroups = [opened.enter_context(_descriptor(path, os.O_WRONLY)) for path in cgroup_files(self.pid)]
            except (OutOfSight, OSError) as error:
                raise ContainerError(f"the container's cgroups cannot be joined: {error}") from None
            numbers = [str(program), _oom_score(self.pid), joining.listed(cgroups), joining.listed(fds)]
            said, _ = await self.views.join("run", [*numbers, *command], [program, *cgroups, *fds], env)
        pid, _, why = said.partition("\n")
        if not pid.isdigit() or why:
            raise ContainerError(f"cannot start {command[0]} in the container: {why or pid or 'it has ended'}")
        return int(pid)

    def exit_of(self, pid: int) -> asyncio.Future[int]:
        """The wait status of a child of pid 1 (the engine, CRIU), once it has ended; of pid 1 itself: killed."""
        if pid == 1:
            return self._ended()
        return self.placeholder.exit_of(pid)

    def host_pids(self) -> dict[int, int]:
        """pid inside → pid on the host, for pid 1 and all below it; what `kubectl exec` started is not."""
        return descendants(self.pid)

    def host_pid(self, pid: int) -> int | None:
        return descendant(self.pid, pid)

    def keep(self, pid: int, port: int) -> None:
        """The engine is this process, and lives as long as its container from now on. Raises ContainerError."""
        try:
            self.placeholder.watch_over(pid, port, _last_words(self.grace))
        except PlaceholderError as error:
            raise ContainerError(str(error)) from None
        self.take()

    def ends_in(self, seconds: float) -> None:
        """It is being ended, and killed so many seconds from now."""
        with contextlib.suppress(PlaceholderError):  # it has ended, or is none any more
            self.placeholder.hold_until(_last_words(seconds))

    def end(self) -> None:
        """It was asked to end, and the engine in it sleeps: it ends at once, as if that had heard SIGTERM. Raises ContainerError."""
        try:
            self.placeholder.exit(128 + signal.SIGTERM)
        except PlaceholderError as error:
            raise ContainerError(str(error)) from None

    def take(self) -> None:
        """The container belongs to the engine in it from now on: `close` ends both."""
        self._kept = True
        self.views.close(but=1)  # the control directory's; the root's would keep its file system busy

    async def take_over(self) -> None:
        """The same for an engine that another agent has put there; it can be told by the control directory then. Raises ContainerError."""
        await self.views.open_control_directory()
        self.take()

    def let_go(self) -> None:
        """For an agent that ends: whatever is in it goes on, and another agent takes over."""
        self.take()
        self.placeholder.close()

    async def empty(self) -> None:
        """Ends every process but the placeholder, which waits again. Raises ContainerError."""
        try:
            await self.placeholder.idle()
            await self._end_all()
            await self.placeholder.idle()
        except PlaceholderError as error:
            raise ContainerError(str(error)) from None

    async def close(self) -> None:
        """Ends everything in it but its placeholder; one that was kept ends with all that is in it."""
        try:
            if self.placeholder.pidfd < 0 or self.placeholder.ended.done():
                return
            if self._kept:
                if self.placeholder.engine and self.placeholder.exit_of(self.placeholder.engine).done():
                    # It ends by itself then, with the engine's exit code.
                    await asyncio.wait([self.placeholder.ended], timeout=_END_SECONDS)
                if not self.placeholder.ended.done():
                    signal.pidfd_send_signal(self.placeholder.pidfd, signal.SIGKILL)
                    await asyncio.wait([self.placeholder.ended], timeout=_END_SECONDS)
            else:
                await self.empty()
                await asyncio.to_thread(self.contents.undo)
        except (ContainerError, OSError):
            await asyncio.wait([self.placeholder.ended], timeout=_GOING_SECONDS)  # its hanging up may be heard before its end
            if not self.placeholder.ended.done():  # else it went meanwhile, and all that was in it
                raise
        finally:
            self.views.close()
            if self._kept:
                self.placeholder.close()

    async def _end_all(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _END_SECONDS
        while others := [host for host in descendants(self.pid).values() if host != self.pid]:
            for host in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(host, signal.SIGKILL)
            if loop.time() > deadline:
                raise ContainerError(f"processes {others} in the container do not end; delete its pod")
            await asyncio.sleep(_PAUSE)  # the kernel takes their memory down, then the placeholder reaps them

    def _ended(self) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def ended(_: object) -> None:
            if not future.done():
                future.set_result(signal.SIGKILL)

        self.placeholder.ended.add_done_callback(ended)
        return future


def _last_words(grace: float) -> float:
    """How long an engine's answers may go on before it is told to end, so that it has a moment for its last words."""
    return grace - min(_LAST_WORDS_SECONDS, grace / 4)


@contextlib.contextmanager
def _descriptor(path: Path | str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _oom_score(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()
