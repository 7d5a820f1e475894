"""What an engine has changed in its place's file system (overlay.py), put into another place over the same files."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import secrets
import shutil
import stat
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from restore_agent.places.overlay import ATTRIBUTE, FIRST, HOLES, OPAQUE, ROOT, SHM, OverlayError


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
                first = int(tar.pax_headers.get(FIRST, sys.maxsize))
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
        if entry.ischr() or ATTRIBUTE + OPAQUE in entry.pax_headers or (there and path.is_dir() != entry.isdir()):
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
        if HOLES not in entry.pax_headers:
            shutil.copyfileobj(content, file, 1 << 20)
            return
        file.truncate(entry.size)
        numbers = [int(number) for number in entry.pax_headers[HOLES].split(",")]
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            content.seek(start)
            file.seek(start)
            file.write(content.read(length))


def _dress(path: Path, entry: tarfile.TarInfo) -> None:
    os.chown(path, entry.uid, entry.gid)
    path.chmod(entry.mode)
    for key, value in entry.pax_headers.items():
        name = key.removeprefix(ATTRIBUTE)
        if name not in (key, OPAQUE):
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"))
    os.utime(path, (entry.mtime, entry.mtime))


def _put_folder(path: Path, entry: tarfile.TarInfo) -> None:
    there = path.is_dir()
    path.mkdir(exist_ok=True)
    at = path.stat()
    looks = (at.st_uid, at.st_gid, stat.S_IMODE(at.st_mode)) == (entry.uid, entry.gid, entry.mode)
    # One that is there and looks as it should is left alone: to touch it would copy it into this layer, too.
    if not there or not looks or any(key.startswith(ATTRIBUTE) for key in entry.pax_headers):
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
