"""A running container, held by a placeholder, as a Place.

A container belongs to a tenant, so what a sandbox may take for granted is guarded here:
- Programs of ours run inside it with the agent's rights (join.c): in its cgroups and namespaces, as children of its pid 1, executed by a
  descriptor and linked statically, so that nothing of the container's file system runs with them.
- Its files are reached through copies of its mounts on which no symbolic link is followed (`root`, `control_directory`).
- Its stdout and stderr stay the runtime's: logs go where they always went, and an agent that ends takes no pipe away from an engine.
Its life is not ours: `close` ends what we put in as long as it was not `keep`-ed, and never the container.
Rejected: CRIU making or joining namespaces by itself (it knows no pid namespace to join, and would run from the container's files), and a
privileged container beside the engine in each pod (its tenant's template would decide over it).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from restore_agent.errors import ErrorKind
from restore_agent.pages import images
from restore_agent.places import checkpoints, joining, overlay
from restore_agent.places.cgroups import OutOfSight, cgroup_files, node_process
from restore_agent.places.isolation import NotIsolated, check_isolated, rights_of
from restore_agent.places.place import CONTROL_DIRECTORY, PlaceError, Route
from restore_agent.places.placeholder import Placeholder, PlaceholderError
from restore_agent.places.processes import descendants, status, taken_over
from restore_agent.snapshots.compatibility import Incompatible, check_files, mapped_files, used_files
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import CONTAINER_FILE, Fits
from restore_agent.workload.control_directory import ENVIRONMENT
from zerowake_shared import pod_environment

_END_SECONDS = 10.0
_GOING_SECONDS = 1.0
_LAST_WORDS_SECONDS = 2.0
_PAUSE = 0.002


class ContainerError(PlaceError):
    """A container cannot be restored into, or a program could not be started in it."""


class ContainerRefused(ContainerError):
    """What the pod's template or its engine does cannot be carried, however often it is tried."""

    kind = ErrorKind.INVALID


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
        address: str,
        volatile: Sequence[str] = (),
        shared: Sequence[str] = (),
        *,
        asked: Mapping[str, Any] = MappingProxyType({}),
        stale_allowed: bool = False,
    ) -> None:
        """`image`: by digest. `address`: the pod's. `volatile`: where volumes are mounted that end with the pod. `shared`: those of them
        that other containers of the pod have, too; what lies in the others is the engine's alone, and is carried with its snapshot.
        `asked`: the container as its pod wants it. `stale_allowed`: an engine may keep what it knows of the pod that it was captured in,
        though this pod asks for its own."""
        self.placeholder = placeholder
        self.address = address
        self.pid = placeholder.pid
        self._image = image
        self._volatile = [PurePosixPath(path.strip("/")) for path in volatile]
        self.grace = 30.0  # seconds from its being asked to end to its being killed
        self._shared = {PurePosixPath(path.strip("/")) for path in shared}
        self._asked = asked
        self._stale_allowed = stale_allowed
        self.stale: list[str] = []  # variables of which the engine that was restored keeps another pod's values
        self.probed: frozenset[str] = frozenset()  # what the kubelet's probes ask its port for; to be answered while its engine sleeps
        self.unanswerable = ""  # why its probes cannot be answered then; empty: they can
        self.gpus: tuple[str, ...] | None = None  # that it was given, once that is known
        self.left_behind: list[str] = []  # volumes that were too large to be carried, which are empty in the next pod
        self._views: list[int] = []
        self._kept = False
        self._undo: Callable[[], None] = lambda: None

    async def open(self) -> Container:
        """Checks that it is isolated, empties it and opens its file system; again before each restore into it. Raises ContainerError."""
        try:
            check_isolated(self.pid)
        except NotIsolated as error:
            raise ContainerError(str(error)) from None
        await self.empty()  # of what an agent that was killed has left half restored
        self._close_views()
        self.root = self.files = await self._view("/", "all")
        self.control_directory = await self._view(str(CONTROL_DIRECTORY), "one")
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
        return Route(self.address)

    @property
    def netns(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    def output(self, name: str) -> ContainerOutput:
        return ContainerOutput(name, self.placeholder)

    async def carried(self) -> dict[str, bytes]:
        """The changes since its image. Raises ContainerError."""

        def archive() -> bytes:
            mounts = overlay.Mounts.of(self.pid)
            volumes = {volume: overlay.is_small(self.root, mounts, volume) for volume in self._own()}
            self.left_behind = [f"/{volume}" for volume, small in volumes.items() if not small]
            small = [volume for volume, small in volumes.items() if small]
            return overlay.archive(mounts.with_volumes(small), Path(node_process(), "root"), self.root)

        try:
            changes = await asyncio.to_thread(archive)
        except overlay.OverlayError as error:
            raise ContainerError(str(error)) from None
        environment = pod_environment.digests(self.environment())
        about = json.dumps({"image": self._image, "environment": environment}).encode()
        return {CONTAINER_FILE: about, **({overlay.CHANGES_FILE: changes} if changes else {})}

    def _own(self) -> list[PurePosixPath]:
        """emptyDirs that no other container writes into."""
        return [volume for volume in self._volatile if volume not in self._shared and (self.root / volume).is_dir()]

    def written(self) -> str:
        return ""  # that it goes with the container is how Kubernetes does it

    async def checkpoint(self, directory: Path, folder: Path) -> Path:
        mounts, node = overlay.Mounts.of(self.pid).with_volumes(self._own()), Path(node_process(), "root")
        try:
            return await asyncio.to_thread(checkpoints.take, self.root, directory, folder, lambda path: mounts.has_changed(path, node))
        except checkpoints.CheckpointError as error:
            raise ContainerError(str(error)) from None

    async def lay_out(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        """Writes what `carried` saved into this container; `close` undoes it unless the container was kept.

        Raises:
            Incompatible: its image or a file that the engine maps is another one here, or it may less.
            ContainerError: the changes cannot be laid out.
        """
        await asyncio.to_thread(self._lay_out, snapshot, fits, hashes)

    def _lay_out(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        about = json.loads((snapshot / CONTAINER_FILE).read_bytes()) if (snapshot / CONTAINER_FILE).exists() else {}
        if (image := about.get("image", self._image)) != self._image:
            raise Incompatible(f"it was taken of image {image}, and the pod's is {self._image}; take the snapshot again")
        self._check_environment(about.get("environment"))
        try:
            if beyond := images.rights(snapshot / "images").beyond(rights_of(self.pid)):
                raise Incompatible(
                    f"its processes have what this container does not allow: {'; '.join(beyond)}; take it in a pod like this one"
                )
            if (snapshot / overlay.CHANGES_FILE).exists():
                own = (overlay.SHM,) if overlay.Mounts.of(self.pid).read_only else (overlay.ROOT, overlay.SHM)
                volumes = [volume for volume in self._own() if volume != overlay.SHM]
                self._undo = overlay.lay_out(snapshot / overlay.CHANGES_FILE, self.root, own, volumes)
        except (overlay.OverlayError, images.ImageError) as error:
            raise ContainerError(str(error)) from None
        check_files(fits, self.root, hashes)

    def environment(self) -> dict[str, str]:
        """Of its first process, which the runtime gave it. Raises ContainerError."""
        try:
            data = Path(f"/proc/{self.pid}/environ").read_bytes()
        except OSError as error:
            raise ContainerError(f"the container has ended: {error}") from None
        given = [each.partition("=") for each in data.decode(errors="surrogateescape").split("\0") if "=" in each]
        return {name: value for name, _, value in given}

    def _check_environment(self, captured: Mapping[str, str] | None) -> None:
        """Leaves word of what is otherwise here for an engine that asks. Raises Incompatible."""
        environment = self.environment()
        if captured is not None:  # else of a snapshot that knows nothing of it
            found = pod_environment.differences(captured, environment, self._asked, allowed=self._stale_allowed)
            own = pod_environment.fields(self._asked)
            if found.wrong:
                names = ", ".join(f"{name} ({own[name]})" if name in own else name for name in found.wrong)
                advice = "; spec.staleEnvironment: allowed lets it keep the old ones" if any(name in own for name in found.wrong) else ""
                raise Incompatible(f"variables of its environment have other values in this pod: {names}{advice}")
            self.stale = found.stale
        told = self.control_directory / ENVIRONMENT
        told.unlink(missing_ok=True)
        with told.open("x") as file:
            os.fchmod(file.fileno(), 0o600)
            os.fchown(file.fileno(), *(int(status(self.pid)[kind].split()[0]) for kind in ("Uid", "Gid")))
            json.dump(environment, file)

    def mapped_files(self, host_pids: Iterable[int]) -> set[Path]:
        """Raises ContainerRefused: one of them is gone with the pod."""
        pids = list(host_pids)
        if used := next(((path, volume) for path in used_files(pids) for volume in self._volatile if _lies_in(path, volume)), None):
            path, volume = used
            if volume in self._shared:
                why = "which other containers of the pod have, too, and which is empty in the next pod"
            elif not overlay.is_small(self.root, overlay.Mounts.of(self.pid), volume):
                why = f"which holds more than is carried with a snapshot ({overlay.MAX_BYTES >> 21} MiB) and is empty in the next pod"
            else:
                why = ""
            if why:
                raise ContainerRefused(f"the engine uses {path} in an emptyDir (/{volume}), {why}; have it in the image")
        mounts, node = overlay.Mounts.of(self.pid).with_volumes(self._own()), Path(node_process(), "root")
        return {path for path in mapped_files(self.root, pids, self.root) if not mounts.has_changed(path, node)}

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
            said, _ = await self._join("run", [*numbers, *command], [program, *cgroups, *fds], env)
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
        self._close_views(but=1)  # the control directory's; the root's would keep its file system busy

    async def take_over(self) -> None:
        """The same for an engine that another agent has put there; it can be told by the control directory then. Raises ContainerError."""
        self.control_directory = await self._view(str(CONTROL_DIRECTORY), "one")
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
                await asyncio.to_thread(self._tidy)
        except (ContainerError, OSError):
            await asyncio.wait([self.placeholder.ended], timeout=_GOING_SECONDS)  # its hanging up may be heard before its end
            if not self.placeholder.ended.done():  # else it went meanwhile, and all that was in it
                raise
        finally:
            self._close_views()
            if self._kept:
                self.placeholder.close()

    def _tidy(self) -> None:
        self._undo()
        if self._views:
            overlay.remove_ghosts(overlay.Mounts.of(self.pid).with_volumes(self._own()), Path(node_process(), "root"), self.root)

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

    async def _view(self, path: str, how: str) -> Path:
        said, fds = await self._join("view", [path, how], [], {})
        if not fds:
            raise ContainerError(f"cannot open {path} of the container: {said or 'it has ended'}")
        self._views += fds
        return Path(f"/proc/self/fd/{fds[0]}")

    def _close_views(self, but: int = 0) -> None:
        """Closes what the agent holds open of the container's file system, all `but` so many of the newest."""
        while len(self._views) > but:
            os.close(self._views.pop(0))

    async def _join(self, what: str, words: Sequence[str], fds: Sequence[int], env: Mapping[str, str]) -> tuple[str, list[int]]:
        if self.placeholder.pidfd < 0:
            raise ContainerError("the container has ended")
        try:
            return await joining.join(self.placeholder.pidfd, what, words, fds, env)
        except joining.JoinFailed as error:
            raise ContainerError(str(error)) from None


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


def _lies_in(path: Path, volume: PurePosixPath) -> bool:
    return PurePosixPath(str(path).lstrip("/")).is_relative_to(volume)


def _oom_score(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()
