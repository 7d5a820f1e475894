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
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import re
import secrets
import shutil
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from restore_agent.errors import AgentError
from restore_agent.places import mount_table

MAX_BYTES, MAX_ENTRIES = 512 << 20, 20_000
_OPAQUE, _WHITEOUT = "trusted.overlay.opaque", "trusted.overlay.whiteout"
_ATTRIBUTE = "SCHILY.xattr."  # how tar names an extended attribute
_HOLES, _SIZE = "GNU.sparse.map", "GNU.sparse.size"  # of a file with holes: where and how long its parts are, and how long it is
_CARRIED = (_OPAQUE, _WHITEOUT, "security.capability", "system.posix_acl_access", "system.posix_acl_default")
_UNKNOWN = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
_FIRST, _ALL = "ZEROWAKE.first", sys.maxsize  # how many entries of it CRIU needs; of one that does not say so: all
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
    with tarfile.TarFile(None, "w", data, format=tarfile.PAX_FORMAT, pax_headers={_FIRST: str(len(first))}) as tar:
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
        opaque = attributes.pop(_OPAQUE, "") == "y"
        if attributes.pop(_WHITEOUT, None) is not None:
            entry.type, entry.devmajor, entry.devminor, entry.size = tarfile.CHRTYPE, 0, 0, 0
        if entry.isblk() or (entry.ischr() and (entry.devmajor, entry.devminor) != (0, 0)):
            raise OverlayError(f"the engine made a device, /{name}, which is not carried")
        if opaque:
            attributes[_OPAQUE] = "y"
        entry.pax_headers = {_ATTRIBUTE + key: value for key, value in attributes.items()}
        if (size := sum(length for _, length in runs)) < entry.size:
            listed = ",".join(f"{start},{length}" for start, length in runs or [(entry.size, 0)])
            entry.pax_headers |= {_HOLES: listed, _SIZE: str(entry.size)}
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


class _Archive(io.FileIO):
    """A file whose lengths cannot be believed: a read of more than there is takes no memory for it."""

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


class Changes:
    """Of a snapshot, put into another place: first what CRIU needs, the rest while it restores. Its calls block."""

    def __init__(self, source: Path, root: Path, own: Iterable[PurePosixPath] = (ROOT, SHM), volumes: Iterable[PurePosixPath] = ()) -> None:
        """
        Args:
            source: what `archive` gave.
            root: a view of the place; of a container one on which no symbolic link is followed.
            own: where its own file systems are mounted. What lies in any other is not the place's to write.
            volumes: its own, too, but what is there already stays: another has made it for this place.
        """
        self._source = source
        self._root = root
        self._kept = frozenset(volumes)
        self._own = (*own, *self._kept)
        self._added: list[Path] = []

    def put_first(self) -> None:
        """What CRIU needs.

        Raises:
            OverlayError: a file's place is a mount here, or cannot be written. Nothing is left of what was put.
        """
        self._put_some(rest=False)

    def put_rest(self) -> None:
        """Raises OverlayError, as `put_first`."""
        self._put_some(rest=True)

    def undo(self) -> None:
        """Takes away again what was added; files that were there before stay as they are now."""
        for path in reversed(self._added):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()
        self._added.clear()

    def _put_some(self, *, rest: bool) -> None:
        try:
            with _Archive(self._source) as file, tarfile.open(None, "r:", file) as tar:  # nothing of it was packed, so nothing is unpacked
                first = int(tar.pax_headers.get(_FIRST, _ALL))
                for entry in itertools.islice(tar, *((first, None) if rest else (first,))):
                    self._put(tar, entry)
        except (OSError, tarfile.TarError, OverlayError, ValueError, LookupError, OverflowError) as error:  # numbers that are none, too
            self.undo()
            if isinstance(error, OverlayError):
                raise
            why = "a symbolic link is in the way" if isinstance(error, OSError) and error.errno == errno.ELOOP else str(error)
            raise OverlayError(f"what the engine had changed in its file system cannot be laid out: {why}") from error

    def _put(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        path, name = _inside(self._root, entry.name), PurePosixPath(entry.name)
        place = max((each for each in self._own if name.is_relative_to(each)), key=lambda each: len(each.parts), default=None)
        if place is None:
            raise OverlayError(f"the snapshot's engine has written /{entry.name}, and the root of this container is read-only")
        if path.parent.stat().st_dev != self._devices[place]:
            raise OverlayError(f"/{entry.name} was in the engine's own file system, and is in a volume here")
        there = os.path.lexists(path)
        if there and place in self._kept:
            return
        if entry.ischr() or _ATTRIBUTE + _OPAQUE in entry.pax_headers or (there and path.is_dir() != entry.isdir()):
            _remove(path)
        if entry.ischr():
            return
        if not there:
            self._added.append(path)
        if entry.isdir():
            _put_folder(path, entry)
            return
        fresh = path.with_name(f".zerowake-{secrets.token_hex(6)}")
        if entry.issym():
            fresh.symlink_to(entry.linkname)
            os.lchown(fresh, entry.uid, entry.gid)
        elif entry.islnk():
            fresh.hardlink_to(_inside(self._root, entry.linkname))
        elif entry.isfifo():
            os.mkfifo(fresh)
            _dress(fresh, entry)
        else:
            _write(tar, fresh, entry)
            _dress(fresh, entry)
        fresh.replace(path)

    @functools.cached_property
    def _devices(self) -> Mapping[PurePosixPath, int]:
        return {point: (self._root / point).stat().st_dev for point in self._own}


def _write(tar: tarfile.TarFile, path: Path, entry: tarfile.TarInfo) -> None:
    content = tar.extractfile(entry)
    with path.open("xb") as file:
        if content is None:
            return
        if _HOLES not in entry.pax_headers:
            shutil.copyfileobj(content, file, 1 << 20)
            return
        file.truncate(entry.size)
        numbers = [int(number) for number in entry.pax_headers[_HOLES].split(",")]
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            content.seek(start)
            file.seek(start)
            file.write(content.read(length))


def _dress(path: Path, entry: tarfile.TarInfo) -> None:
    os.chown(path, entry.uid, entry.gid)
    path.chmod(entry.mode)
    for key, value in entry.pax_headers.items():
        name = key.removeprefix(_ATTRIBUTE)
        if name not in (key, _OPAQUE):
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"))
    os.utime(path, (entry.mtime, entry.mtime))


def _put_folder(path: Path, entry: tarfile.TarInfo) -> None:
    there = path.is_dir()
    path.mkdir(exist_ok=True)
    at = path.stat()
    looks = (at.st_uid, at.st_gid, stat.S_IMODE(at.st_mode)) == (entry.uid, entry.gid, entry.mode)
    # One that is there and looks as it should is left alone: to touch it would copy it into this layer, too.
    if not there or not looks or any(key.startswith(_ATTRIBUTE) for key in entry.pax_headers):
        _dress(path, entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _inside(root: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/"):
        raise OverlayError(f"the snapshot names a file {name!r}")
    return root.joinpath(*parts)


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
    if found.get(_OPAQUE) not in (None, "y"):
        raise OverlayError(f"/{name} holds whiteouts of a kind that is not carried; take the snapshot on another kernel")
    return found
