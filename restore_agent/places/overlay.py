"""What an engine has changed in its place's file system, carried with its snapshot: files it wrote, and files it removed.

Taken from the upper layers of the place's overlays (a container has one, a sandbox one for each file system of the machine), where a
removed file is a character device 0:0, and a directory that hides the one below it has the attribute `trusted.overlay.opaque`; put on
through the merged view of another place over the same files, where overlayfs makes whiteouts of its own. Names like `.wh.*` mean nothing
to a kernel (they are of image layers), and are files like any other. The form between is a tar: whiteouts as devices 0:0, opaque
directories by that attribute. What else is mounted is not carried (volumes, secrets, the kubelet's files, shared folders), but for what
the engine has for itself: /dev/shm, a sandbox's /run, and emptyDirs, which take the place of a container's file system where that is
read-only. Nor are sockets, which CRIU makes itself, and Python's caches of bytecode.

It is limited: a snapshot's small files are staged in memory, and laid out on the way of every restore. What counts is what was written:
a file's holes take no room here or there. vLLM's ranks talk by rings in /dev/shm of 640 MiB, of which they have written a few.
The way into another place is in laid_out_changes.py.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from restore_agent.errors import AgentError
from restore_agent.places import mount_table

MAX_BYTES, MAX_ENTRIES = 512 << 20, 20_000
OPAQUE, _WHITEOUT = "trusted.overlay.opaque", "trusted.overlay.whiteout"
ATTRIBUTE = "SCHILY.xattr."  # how tar names an extended attribute
HOLES, _SIZE = "GNU.sparse.map", "GNU.sparse.size"  # of a file with holes: where and how long its parts are, and how long it is
_CARRIED = (OPAQUE, _WHITEOUT, "security.capability", "system.posix_acl_access", "system.posix_acl_default")
_UNKNOWN = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
FIRST = "ZEROWAKE.first"  # how many entries of it CRIU needs; of one that does not say so: all
_LEFT_OUT = frozenset({"__pycache__"})
_OURS = frozenset({PurePosixPath("run/zerowake"), PurePosixPath("run/criu.kdat")})
SHM, RUN = PurePosixPath("dev/shm"), PurePosixPath("run")
ROOT = PurePosixPath()
_GHOST = re.compile(r"\.cr\.[0-9a-f]+\.ghost$")  # CRIU's name for a deleted file that it makes again


class OverlayError(AgentError):
    """The changes of a container cannot be carried, or not be laid out."""

    reason = "sandbox-failed"


@dataclass(frozen=True)
class Mounts:
    """What is mounted in a place. Paths inside it are relative to its root."""

    uppers: Mapping[PurePosixPath, Path]  # where an overlay is mounted → its upper layer, as the node sees it
    points: frozenset[PurePosixPath]  # where anything else is
    whole: tuple[PurePosixPath, ...] = (SHM,)  # of those, what is the place's own all the same: carried with all that is in it
    read_only: bool = False  # the root: nothing but a container's runtime has changed anything in it

    @classmethod
    def of(cls, pid: int) -> Mounts:
        """Of a container, by its first process. Raises OSError: that has ended."""
        uppers, points, read_only = {}, set(), False
        for mount in mount_table.read(pid):
            point = mount.point.relative_to("/")
            if point != ROOT:
                points.add(point)
                continue
            read_only = "ro" in mount.flags
            if mount.kind == "overlay" and not read_only and (upper := mount.option("upperdir")):
                uppers[ROOT] = Path(upper)
        return cls(uppers, frozenset(points), read_only=read_only)

    def with_volumes(self, volumes: Iterable[PurePosixPath]) -> Mounts:
        """These are the place's own, too."""
        return replace(self, whole=tuple(dict.fromkeys((*self.whole, *volumes))))

    def changed(self, node: Path, root: Path) -> Iterator[tuple[PurePosixPath, Path]]:
        """Every path that was changed, parents first, and where it is to be read. Arguments as of `archive`."""
        apart = self.points | self.uppers.keys()
        for point, upper in sorted(self.uppers.items()):
            folder = node / upper.relative_to("/")
            for path in _walk(folder, point, apart):
                yield path, folder / path.relative_to(point)
        for point in self.whole:
            for path in _walk(root / point, point, apart):
                yield path, root / path

    def has_changed(self, path: Path, node: Path) -> bool:
        """Whether a file is one that is carried, and so nobody else's."""
        name = PurePosixPath(path).relative_to("/")
        point = next((each for each in [name, *name.parents] if each in self.uppers or each in self.points), None)
        if point in self.whole:
            return True
        if point is None or point not in self.uppers:
            return False
        return os.path.lexists(node / self.uppers[point].relative_to("/") / name.relative_to(point))


def archive(
    mounts: Mounts, node: Path, root: Path, advice: str = "have it in the image, or in a volume", opened: Collection[str] | None = None
) -> bytes:
    """The changes as a tar, led by those without which CRIU cannot begin; empty where there are none.

    Args:
        mounts: the place's.
        node: the node's own root, in which upper layers lie.
        root: the place's, as the agent may walk it.
        advice: what to do where they are too much.
        opened: paths, without the leading slash, of the files that CRIU opens; None: it may open any.

    Raises:
        OverlayError: they are too much, or of a kind that cannot be carried.
    """
    if not mounts.uppers and not mounts.read_only:
        raise OverlayError("the container's root is no overlay, so what its engine changed cannot be told; use the overlayfs snapshotter")
    first: list[tuple[Path, PurePosixPath]] = []
    late: list[tuple[Path, PurePosixPath]] = []
    for name, path in mounts.changed(node, root):
        looks = path.lstat()
        if stat.S_ISSOCK(looks.st_mode):
            continue
        can_wait = opened is not None and stat.S_ISREG(looks.st_mode) and looks.st_nlink == 1 and str(name) not in opened
        (late if can_wait else first).append((path, name))
    data = io.BytesIO()
    with tarfile.TarFile(None, "w", data, format=tarfile.PAX_FORMAT, pax_headers={FIRST: str(len(first))}) as tar:
        counted = _Counted(tar, advice)
        for path, name in (*first, *late):
            counted.add(path, name)
        return data.getvalue() if counted.entries else b""


def remove_ghosts(mounts: Mounts, node: Path, root: Path) -> None:
    """What a CRIU that was killed in the middle has left: the next one would stumble over it. Arguments as of `archive`."""
    for path, _ in mounts.changed(node, root):
        if _GHOST.search(path.name):
            with contextlib.suppress(OSError):
                (root / path).unlink()


def is_small(root: Path, mounts: Mounts, volume: PurePosixPath) -> bool:
    """Whether a volume can be carried: by half of what is carried in all, so that it leaves room for the rest."""
    size = entries = 0
    for path in _walk(root / volume, volume, mounts.points):
        with contextlib.suppress(FileNotFoundError):
            looks = (root / path).lstat()
            runs = _written(root / path, looks.st_size) if stat.S_ISREG(looks.st_mode) else []
            size, entries = size + sum(length for _, length in runs), entries + 1
        if size > MAX_BYTES // 2 or entries > MAX_ENTRIES // 2:
            return False
    return True


class _Counted:
    """A tar that grows within bounds."""

    def __init__(self, tar: tarfile.TarFile, advice: str) -> None:
        self._tar = tar
        self._advice = advice
        self._bytes: Counter[str] = Counter()
        self.entries = 0

    def add(self, path: Path, name: PurePosixPath) -> None:
        attributes = _attributes(path, name)
        entry = self._tar.gettarinfo(str(path), str(name))
        runs = _written(path, entry.size) if entry.isreg() else []
        opaque = attributes.pop(OPAQUE, "") == "y"
        if attributes.pop(_WHITEOUT, None) is not None:
            entry.type, entry.devmajor, entry.devminor, entry.size = tarfile.CHRTYPE, 0, 0, 0
        if entry.isblk() or (entry.ischr() and (entry.devmajor, entry.devminor) != (0, 0)):
            raise OverlayError(f"the engine made a device, /{name}, which is not carried")
        if opaque:
            attributes[OPAQUE] = "y"
        entry.pax_headers = {ATTRIBUTE + key: value for key, value in attributes.items()}
        if (size := sum(length for _, length in runs)) < entry.size:
            listed = ",".join(f"{start},{length}" for start, length in runs or [(entry.size, 0)])
            entry.pax_headers |= {HOLES: listed, _SIZE: str(entry.size)}
            entry.size = size
        self.entries += 1
        self._bytes[str(name.parent)] += size
        if sum(self._bytes.values()) > MAX_BYTES or self.entries > MAX_ENTRIES:
            folder, size = self._bytes.most_common(1)[0]
            raise OverlayError(
                f"the engine wrote more than {MAX_BYTES >> 20} MiB or {MAX_ENTRIES} files into its own file system, "
                f"{size >> 20} MiB of it into /{folder}; {self._advice}"
            )
        if size:
            with path.open("rb") as file:
                self._tar.addfile(entry, io.BytesIO(b"".join(os.pread(file.fileno(), length, start) for start, length in runs)))
        else:
            self._tar.addfile(entry)


def _walk(folder: Path, name: PurePosixPath, apart: Collection[PurePosixPath]) -> Iterator[PurePosixPath]:
    """Paths in a folder that is called `name` in the place, parents first; without those of `apart` and what is in them. A folder that has
    gone meanwhile has none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in found:
        path = name / entry.name
        if path in apart or path in _OURS or entry.name in _LEFT_OUT:
            continue
        if not entry.is_dir(follow_symlinks=False):
            yield path
            continue
        inside = _walk(Path(entry.path), path, apart)
        first = next(inside, None)
        # Of a package that was imported nothing but its bytecode is new, and hundreds may have been.
        if first or not any(Path(entry.path).iterdir()):
            yield path
        if first:
            yield first
            yield from inside


def _written(path: Path, size: int) -> list[tuple[int, int]]:
    """Start and length of each part of a file that is no hole."""
    found, end = [], 0
    with path.open("rb") as file:
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole comes after
            end = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), size)
            found.append((start, end - start))
    return found


def _attributes(path: Path, name: PurePosixPath) -> dict[str, str]:
    """Those to carry, and what overlayfs means by its own."""
    found = {}
    for key in os.listxattr(path, follow_symlinks=False):
        if key in _UNKNOWN:
            raise OverlayError(
                f"/{name} was changed in a way that is not carried ({key}); mount overlays with redirect_dir=off,metacopy=off"
            )
        if key in _CARRIED or key.startswith("user."):
            value = os.getxattr(path, key, follow_symlinks=False)
            found[key] = value.decode("utf-8", "surrogateescape")
    if found.get(OPAQUE) not in (None, "y"):
        raise OverlayError(f"/{name} holds whiteouts of a kind that is not carried; take the snapshot on another kernel")
    return found
