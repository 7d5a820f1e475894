"""What is in a container beside its image: what its engine has changed, which is carried with a snapshot and laid out at a restore.

Carried is what the engine wrote into the container's own layer, and into emptyDirs that no other container of its pod mounts. What lies in
a volume that others fill is theirs, and is not there in the next pod: an engine that uses such a file is refused. Its environment is the
container's, as the runtime gave it: what differs from the pod that was captured is found here, and told to the engine.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from restore_agent.pages import images
from restore_agent.places import checkpoints, overlay
from restore_agent.places.acting_as import User
from restore_agent.places.cgroups import node_process
from restore_agent.places.container_error import ContainerError, ContainerRefused
from restore_agent.places.container_views import ContainerViews
from restore_agent.places.isolation import rights_of
from restore_agent.places.laid_out_changes import Changes
from restore_agent.places.processes import status
from restore_agent.snapshots.compatibility import Incompatible, check_files, mapped_files, used_files
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import CHANGES_FILE, CONTAINER_FILE, Fits
from restore_agent.workload.control_directory import ENVIRONMENT
from zerowake_shared import pod_environment
from zerowake_shared.background import to_its_end


class ContainerContents:
    """Of one container."""

    def __init__(
        self,
        pid: int,
        views: ContainerViews,
        image: str,
        volatile: Sequence[str],
        shared: Sequence[str],
        asked: Mapping[str, Any],
        *,
        stale_allowed: bool,
    ) -> None:
        """`pid`: of its first process. The others: see Container."""
        self._pid = pid
        self._views = views
        self._image = image
        self._volatile = [PurePosixPath(path.strip("/")) for path in volatile]
        self._shared = {PurePosixPath(path.strip("/")) for path in shared}
        self._asked = asked
        self._stale_allowed = stale_allowed
        self._changes: Changes | None = None  # that were put into it
        self.stale: list[str] = []  # variables of which the engine that was restored keeps another pod's values
        self.left_behind: list[str] = []  # volumes that were too large to be carried, which are empty in the next pod

    async def carried(self, dump: Path) -> dict[str, bytes]:
        """The changes since its image. `dump`: CRIU's images of it. Raises ContainerError."""

        def archive() -> bytes:
            mounts = overlay.Mounts.of(self._pid)
            volumes = {volume: overlay.is_small(self._views.root, mounts, volume) for volume in self._own()}
            self.left_behind = [f"/{volume}" for volume, small in volumes.items() if not small]
            small = [volume for volume, small in volumes.items() if small]
            mounts, node = mounts.with_volumes(small), Path(node_process(), "root")
            return overlay.archive(mounts, node, self._views.root, opened=images.opened(dump))

        try:
            changes = await asyncio.to_thread(archive)
        except (overlay.OverlayError, images.ImageError) as error:
            raise ContainerError(str(error)) from None
        environment = pod_environment.digests(self.environment())
        about = json.dumps({"image": self._image, "environment": environment}).encode()
        return {CONTAINER_FILE: about, **({CHANGES_FILE: changes} if changes else {})}

    def _own(self) -> list[PurePosixPath]:
        """emptyDirs that no other container writes into."""
        return [volume for volume in self._volatile if volume not in self._shared and (self._views.root / volume).is_dir()]

    async def checkpoint(self, directory: Path, folder: Path) -> Path:
        has_changed = self._has_changed()
        try:
            return await asyncio.to_thread(checkpoints.take, self._views.root, directory, folder, has_changed)
        except checkpoints.CheckpointError as error:
            raise ContainerError(str(error)) from None

    async def lay_out(self, snapshot: Path) -> None:
        """Writes what `carried` saved into this container, as far as CRIU opens it; `close` undoes it unless the container was kept.

        Raises:
            Incompatible: its image is another one here, or its environment.
            ContainerError: the changes cannot be laid out.
        """
        await to_its_end(asyncio.to_thread(self._lay_out, snapshot))

    async def complete(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        """The rest of it, which may be hundreds of files that only an engine which compiles would read.

        Raises:
            Incompatible: a file that the engine maps is another one here, or it may less.
            ContainerError: the changes cannot be laid out.
        """
        await to_its_end(asyncio.to_thread(self._complete, snapshot, fits, hashes))

    def _lay_out(self, snapshot: Path) -> None:
        about = json.loads((snapshot / CONTAINER_FILE).read_bytes()) if (snapshot / CONTAINER_FILE).exists() else {}
        if (image := about.get("image", self._image)) != self._image:
            raise Incompatible(f"it was taken of image {image}, and the pod's is {self._image}; take the snapshot again")
        self._check_environment(about.get("environment"))
        self._changes = None
        if not (snapshot / CHANGES_FILE).exists():
            return
        own = (overlay.SHM,) if overlay.Mounts.of(self._pid).read_only else (overlay.ROOT, overlay.SHM)
        volumes = [volume for volume in self._own() if volume != overlay.SHM]
        self._changes = Changes(snapshot / CHANGES_FILE, self._views.root, own, volumes)
        try:
            self._changes.put_first()
        except overlay.OverlayError as error:
            raise ContainerError(str(error)) from None

    def _complete(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        try:
            if beyond := images.rights(snapshot / "images").beyond(rights_of(self._pid)):
                raise Incompatible(
                    f"its processes have what this container does not allow: {'; '.join(beyond)}; take it in a pod like this one"
                )
            if self._changes:
                self._changes.put_rest()
        except (overlay.OverlayError, images.ImageError) as error:
            raise ContainerError(str(error)) from None
        check_files(fits, self._views.root, hashes)

    def environment(self) -> dict[str, str]:
        """Of its first process, which the runtime gave it. Raises ContainerError."""
        try:
            data = Path(f"/proc/{self._pid}/environ").read_bytes()
        except OSError as error:
            raise ContainerError(f"the container has ended: {error}") from None
        given = [each.partition("=") for each in data.decode(errors="surrogateescape").split("\0") if "=" in each]
        return {name: value for name, _, value in given}

    def user(self) -> User:
        """Of its first process. Raises ContainerError."""
        try:
            found = status(self._pid)
        except OSError as error:
            raise ContainerError(f"the container has ended: {error}") from None
        uid, gid = (int(found[kind].split()[0]) for kind in ("Uid", "Gid"))
        try:
            lines = (self._views.root / "etc/passwd").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        known = (line.split(":") for line in lines)
        return User(uid, gid, next((each[0] for each in known if len(each) > 2 and each[2] == str(uid)), ""))

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
        told = self._views.control_directory / ENVIRONMENT
        told.unlink(missing_ok=True)
        with told.open("x") as file:
            os.fchmod(file.fileno(), 0o600)
            os.fchown(file.fileno(), *(int(status(self._pid)[kind].split()[0]) for kind in ("Uid", "Gid")))
            json.dump(environment, file)

    def mapped_files(self, host_pids: Iterable[int]) -> set[Path]:
        """Raises ContainerRefused: one of them is gone with the pod."""
        pids = list(host_pids)
        used = {volume: path for path in used_files(pids) for volume in self._volatile if _lies_in(path, volume)}
        for volume, path in used.items():
            if why := self._is_lost(volume):
                raise ContainerRefused(f"the engine uses {path} in an emptyDir (/{volume}), {why}; have it in the image")
        has_changed = self._has_changed()
        return {path for path in mapped_files(self._views.root, pids, self._views.root) if not has_changed(path)}

    def _is_lost(self, volume: PurePosixPath) -> str:
        """Why what lies there is not there in the next pod; empty: it is carried."""
        if volume in self._shared:
            return "which other containers of the pod have, too, and which is empty in the next pod"
        if not overlay.is_small(self._views.root, overlay.Mounts.of(self._pid), volume):
            return f"which holds more than is carried with a snapshot ({overlay.MAX_BYTES >> 21} MiB) and is empty in the next pod"
        return ""

    def _has_changed(self) -> Callable[[Path], bool]:
        """Whether a file is the engine's own, and so carried."""
        mounts, node = overlay.Mounts.of(self._pid).with_volumes(self._own()), Path(node_process(), "root")
        return lambda path: mounts.has_changed(path, node)

    def undo(self) -> None:
        """Takes out again what `lay_out` wrote, and what CRIU left. Blocks."""
        if self._changes:
            self._changes.undo()
        if self._views.is_open:
            overlay.remove_ghosts(overlay.Mounts.of(self._pid).with_volumes(self._own()), Path(node_process(), "root"), self._views.root)


def _lies_in(path: Path, volume: PurePosixPath) -> bool:
    return PurePosixPath(str(path).lstrip("/")).is_relative_to(volume)
