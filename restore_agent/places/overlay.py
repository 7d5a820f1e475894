"""What an engine has changed in its container's file system, carried with its snapshot: files it wrote, and files it removed.

Taken from the upper layer of the container's overlay, where a removed file is a character device 0:0, and a directory that hides the one
below it has the attribute `trusted.overlay.opaque`; put on through the merged view of another container of the same image, where overlayfs
makes whiteouts of its own. Names like `.wh.*` mean nothing to a kernel (they are of image layers), and are files like any other. The form
between is a tar: whiteouts as devices 0:0, opaque directories by that attribute. What is mounted into a container is not carried (volumes,
secrets, the kubelet's files), but for /dev/shm and for emptyDirs that the engine has for itself, which take the place of its file system
where that is read-only; nor are sockets, which CRIU makes itself, and Python's caches of bytecode.

It is limited: a snapshot's small files are staged in memory, and laid out on the way of every restore.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from restore_agent.errors import AgentError

MAX_BYTES, MAX_ENTRIES = 256 << 20, 20_000
_OPAQUE, _WHITEOUT = "trusted.overlay.opaque", "trusted.overlay.whiteout"
_ATTRIBUTE = "SCHILY.xattr."  # how tar names an extended attribute
_UNKNOWN = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
_LEFT_OUT = frozenset({"__pycache__"})
_OURS = PurePosixPath("run/zerowake")
_ROOT, _SHM = PurePosixPath(), PurePosixPath("dev/shm")
_GHOST = re.compile(r"\.cr\.[0-9a-f]+\.ghost$")  # CRIU's name for a deleted file that it makes again


class OverlayError(AgentError):
    """The changes of a container cannot be carried, or not be laid out."""

    reason = "sandbox-failed"


@dataclass(frozen=True)
class Mounts:
    """What the kernel says of a process's mounts."""

    upper: Path | None  # of the root, as the runtime named it; None: the root is no overlay
    points: frozenset[PurePosixPath]  # all but the root, relative to it
    read_only: bool = False  # the root: nothing but the runtime itself has changed anything in it

    @classmethod
    def of(cls, pid: int) -> Mounts:
        """Raises OSError: the process has ended."""
        upper, points, read_only = None, set(), False
        for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            point, flags = _unescaped(fields.split()[4]), fields.split()[5].split(",")
            kind, _, options = rest.split(" ", 2)
            if point != "/":
                points.add(PurePosixPath(point.lstrip("/")))
                continue
            read_only = "ro" in flags
            if kind == "overlay":
                found = re.search(r"(?:^|,)upperdir=((?:\\.|[^,\\])*)", options)
                upper = Path(_unescaped(found[1])) if found else None
        return cls(upper, frozenset(points), read_only)


def archive(mounts: Mounts, node: Path, root: Path, volumes: Iterable[PurePosixPath] = ()) -> bytes:
    """The changes as a tar; empty where there are none.

    Args:
        mounts: of the container's pid 1.
        node: the node's own root, in which the upper layer lies.
        root: the container's, as the agent may walk it.
        volumes: what is mounted there is carried whole.

    Raises:
        OverlayError: they are too much, or of a kind that cannot be carried.
    """
    if mounts.upper is None and not mounts.read_only:
        raise OverlayError("the container's root is no overlay, so what its engine changed cannot be told; use the overlayfs snapshotter")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        counted = _Counted(tar)
        if mounts.upper and not mounts.read_only:
            upper = node / mounts.upper.relative_to("/")
            for path in _changed(upper, PurePosixPath(), mounts.points):
                counted.add(upper / path, path)
        for path in _mounted(root, mounts, volumes):
            counted.add(root / path, path)
        return data.getvalue() if counted.entries else b""


def remove_ghosts(mounts: Mounts, node: Path, root: Path, volumes: Iterable[PurePosixPath] = ()) -> None:
    """What a CRIU that was killed in the middle has left: the next one would stumble over it. Arguments as of `archive`."""
    written = mounts.upper and not mounts.read_only
    changed = _changed(node / mounts.upper.relative_to("/"), PurePosixPath(), mounts.points) if mounts.upper and written else ()
    for path in [*changed, *_mounted(root, mounts, volumes)]:
        if _GHOST.search(path.name):
            with contextlib.suppress(OSError):
                (root / path).unlink()


def is_small(root: Path, mounts: Mounts, volume: PurePosixPath) -> bool:
    """Whether a volume can be carried: by half of what is carried in all, so that it leaves room for the rest."""
    size = entries = 0
    for path in _below(root / volume, volume, mounts.points):
        with contextlib.suppress(FileNotFoundError):
            size, entries = size + (root / path).lstat().st_size, entries + 1
        if size > MAX_BYTES // 2 or entries > MAX_ENTRIES // 2:
            return False
    return True


class _Counted:
    """A tar that grows within bounds."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._bytes: Counter[str] = Counter()
        self.entries = 0

    def add(self, path: Path, name: PurePosixPath) -> None:
        attributes = _attributes(path, name)
        entry = self._tar.gettarinfo(str(path), str(name))
        if entry is None:  # a socket
            return
        opaque = attributes.pop(_OPAQUE, "") == "y"
        if attributes.pop(_WHITEOUT, None) is not None:
            entry.type, entry.devmajor, entry.devminor, entry.size = tarfile.CHRTYPE, 0, 0, 0
        if entry.isblk() or (entry.ischr() and (entry.devmajor, entry.devminor) != (0, 0)):
            raise OverlayError(f"the engine made a device, /{name}, which is not carried")
        if opaque:
            attributes[_OPAQUE] = "y"
        entry.pax_headers = {_ATTRIBUTE + key: value for key, value in attributes.items()}
        self.entries += 1
        self._bytes[str(name.parent)] += entry.size
        if sum(self._bytes.values()) > MAX_BYTES or self.entries > MAX_ENTRIES:
            folder, size = self._bytes.most_common(1)[0]
            raise OverlayError(
                f"the engine wrote more than {MAX_BYTES >> 20} MiB or {MAX_ENTRIES} files into its container's own file system, "
                f"{size >> 20} MiB of it into /{folder}; have it in the image, or in a volume"
            )
        if entry.isreg() and entry.size:
            with path.open("rb") as file:
                self._tar.addfile(entry, file)
        else:
            self._tar.addfile(entry)


def lay_out(source: Path, root: Path, volumes: Iterable[PurePosixPath] = (), *, read_only: bool = False) -> Callable[[], None]:
    """Puts the changes into another container. `root`: a view of it on which no symbolic link is followed. `volumes`: mounts that are
    the container's own, in which what is there already stays: another has made it for this pod. `read_only`: its root is.

    Returns what takes away again what was added; files that were there before stay as they are now.

    Raises:
        OverlayError: a file's place is a mount here, or cannot be written.
    """
    added: list[Path] = []
    writable = {place: (root / place).stat().st_dev for place in (_SHM, *volumes)}
    if not read_only:
        writable[_ROOT] = root.stat().st_dev

    def undo() -> None:
        for path in reversed(added):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()

    try:
        with tarfile.open(source) as tar:
            for entry in tar:
                _put(tar, entry, root, writable, added)
    except (OSError, tarfile.TarError, OverlayError) as error:
        undo()
        if isinstance(error, OverlayError):
            raise
        why = "a symbolic link is in the way" if isinstance(error, OSError) and error.errno == errno.ELOOP else str(error)
        raise OverlayError(f"the changes of the snapshot's container cannot be laid out: {why}") from error
    return undo


def _put(tar: tarfile.TarFile, entry: tarfile.TarInfo, root: Path, writable: dict[PurePosixPath, int], added: list[Path]) -> None:
    path, name = _inside(root, entry.name), PurePosixPath(entry.name)
    place = max((place for place in writable if name.is_relative_to(place)), key=lambda place: len(place.parts), default=None)
    if place is None:
        raise OverlayError(f"the snapshot's engine has written /{entry.name}, and the root of this container is read-only")
    if path.parent.stat().st_dev != writable[place]:
        raise OverlayError(f"/{entry.name} was in the container's own file system, and is in a volume here")
    there = os.path.lexists(path)
    if there and place not in (_ROOT, _SHM):
        return
    if entry.ischr() or _ATTRIBUTE + _OPAQUE in entry.pax_headers or (there and path.is_dir() != entry.isdir()):
        _remove(path)
    if entry.ischr():
        return
    if not there:
        added.append(path)
    if entry.isdir():
        path.mkdir(exist_ok=True)
        _dress(path, entry)
        return
    fresh = path.with_name(f".zerowake-{secrets.token_hex(6)}")
    if entry.issym():
        fresh.symlink_to(entry.linkname)
        os.lchown(fresh, entry.uid, entry.gid)
    elif entry.islnk():
        fresh.hardlink_to(_inside(root, entry.linkname))
    elif entry.isfifo():
        os.mkfifo(fresh)
        _dress(fresh, entry)
    else:
        content = tar.extractfile(entry)
        with fresh.open("xb") as file:
            if content:
                shutil.copyfileobj(content, file, 1 << 20)
        _dress(fresh, entry)
    fresh.replace(path)


def _dress(path: Path, entry: tarfile.TarInfo) -> None:
    os.chown(path, entry.uid, entry.gid)
    path.chmod(entry.mode)
    for key, value in entry.pax_headers.items():
        name = key.removeprefix(_ATTRIBUTE)
        if name not in (key, _OPAQUE):
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"))
    os.utime(path, (entry.mtime, entry.mtime))


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


def _changed(folder: Path, name: PurePosixPath, mounted: frozenset[PurePosixPath]) -> Iterator[PurePosixPath]:
    """Paths in an upper layer, parents first."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = name / entry.name
        if path in mounted or path in (_OURS, _SHM) or entry.name in _LEFT_OUT:
            continue
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _changed(Path(entry.path), path, mounted)


def _mounted(root: Path, mounts: Mounts, volumes: Iterable[PurePosixPath]) -> Iterator[PurePosixPath]:
    """Paths in /dev/shm, of the kinds that an engine keeps there, and in the volumes."""
    for path in _below(root / _SHM, _SHM, mounts.points):
        if not (root / path).is_symlink() and ((root / path).is_file() or (root / path).is_dir()):
            yield path
    for volume in volumes:
        if volume != _SHM:
            yield from _below(root / volume, volume, mounts.points)


def _below(folder: Path, name: PurePosixPath, mounted: frozenset[PurePosixPath]) -> Iterator[PurePosixPath]:
    """All paths below a mount that are of this mount, parents first. A folder that has gone meanwhile has none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in found:
        path = name / entry.name
        if path in mounted:
            continue
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), path, mounted)


def _attributes(path: Path, name: PurePosixPath) -> dict[str, str]:
    """Those to carry, and what overlayfs means by its own."""
    found = {}
    for key in os.listxattr(path, follow_symlinks=False):
        if key in _UNKNOWN:
            raise OverlayError(
                f"/{name} was changed in a way that is not carried ({key}); mount overlays with redirect_dir=off,metacopy=off"
            )
        if key in (_OPAQUE, _WHITEOUT, "security.capability") or key.startswith("user."):
            value = os.getxattr(path, key, follow_symlinks=False)
            found[key] = value.decode("utf-8", "surrogateescape")
    if found.get(_OPAQUE) not in (None, "y"):
        raise OverlayError(f"/{name} holds whiteouts of a kind that is not carried; take the snapshot on another kernel")
    return found


def _unescaped(text: str) -> str:
    text = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
    return re.sub(r"\\(.)", r"\1", text)
