"""Files of a compile cache, put where an engine that is started cold finds them.

What is there stays as it is: a file is put only where none is. Engines run what is in these folders, and some end where they find a half
of it (vLLM does, whose own index names what TorchInductor has to have). So all that is missing is written apart first, in a folder
`.zerowake-…` of the same cache, and is on the disk before any of it is put in its place; then a folder that was missing comes as a whole,
by one rename, and only into folders that are there already file by file. One who is killed in between leaves a folder that no engine looks
at, and the next one goes on.

The cache's folder must be the engine's user's, and nobody else's to write in; below it no link is followed. That user is the agent's own,
or a container's, whose rights the caller has then (acting_as.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from restore_agent.errors import AgentError
from restore_agent.places.acting_as import User
from restore_agent.snapshots.compile_caches import CacheFile

APART = ".zerowake-"  # begins the names of what is not in its place yet
_SPARE = 64 << 20  # bytes of the file system that are left free
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_THERE = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
_libc = ctypes.CDLL(None, use_errno=True)


class CannotLayOut(AgentError):
    """A cache's folder cannot be written, or is not one that the agent should write into."""

    reason = "io-error"


@dataclass
class _Tree:
    """A folder of what is missing: every name in it is a file's, or a folder's."""

    folders: dict[str, _Tree] = field(default_factory=dict)
    files: dict[str, CacheFile] = field(default_factory=dict)

    def add(self, file: CacheFile) -> None:
        at = self
        *folders, name = PurePosixPath(file.path).parts
        for each in folders:
            at = at.folders.setdefault(each, _Tree())
        at.files[name] = file


class LaidOutCache:
    """One cache's folder, held against every other agent until the block ends. Its calls block on the disk."""

    def __init__(self, path: Path, fd: int, user: User, name: str) -> None:
        self._path = path
        self._fd = fd
        self._user = user
        self._name = name
        self._apart = f"{APART}{secrets.token_hex(6)}"

    @classmethod
    @contextlib.contextmanager
    def held(cls, path: Path, user: User | None = None, name: str = "") -> Iterator[LaidOutCache]:
        """`path`: a real path; a folder that is missing is made. `user`: whose it has to be; None: the agent's own. `name`: what it is
        called in messages, if not by its path. Raises CannotLayOut."""
        name = name or str(path)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o755)
            fd = os.open(path, _FOLDER)
        except OSError as error:
            raise CannotLayOut(f"the compile cache {name} cannot be written: {error.strerror}") from None
        cache = cls(path, fd, user or User(os.geteuid(), os.getegid()), name)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotLayOut(f"another agent is at work in the compile cache {name}") from None
            cache._check()
            cache._clear()
            try:
                yield cache
            finally:
                cache._clear()
        finally:
            os.close(fd)

    def missing(self, files: Iterable[CacheFile]) -> list[CacheFile]:
        """Those in whose place nothing is, in their order. Raises CannotLayOut."""
        tree, listed = _Tree(), list(files)
        for file in listed:
            tree.add(file)
        try:
            found = set(_missing(tree, self._fd))
        except OSError as error:
            raise CannotLayOut(f"the compile cache {self._name} cannot be read: {error.strerror}") from None
        return [file for file in listed if file in found]

    def lay_out(self, files: Sequence[CacheFile], content: Callable[[CacheFile], bytes]) -> None:
        """Puts these files, of which none was there, in their places: all of them, or where it fails none.

        Args:
            content: is asked for each, in their order.

        Raises CannotLayOut; what `content` does.
        """
        self._check_room(sum(file.size for file in files))
        try:
            os.mkdir(self._apart, 0o700, dir_fd=self._fd)
            apart = self._path / self._apart
            tree = _Tree()
            for file in files:
                target = apart / file.path
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
                _write(target, file, content(file))
                tree.add(file)
            if _libc.syncfs(self._fd) < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            source = os.open(self._apart, _FOLDER, dir_fd=self._fd)
            try:
                _put(tree, source, self._fd)
            finally:
                os.close(source)
        except OSError as error:
            full = ": make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise CannotLayOut(f"the compile cache {self._name} cannot be written: {error.strerror}{full}") from None

    def _check(self) -> None:
        at = os.fstat(self._fd)
        others = at.st_mode & stat.S_IWOTH or (at.st_mode & stat.S_IWGRP and at.st_gid != self._user.gid)
        if at.st_uid != self._user.uid or others:
            raise CannotLayOut(
                f"the compile cache {self._name} is another user's, or others may write there: engines run what is in it, so nothing is "
                f"put there; `chown {self._user.uid}` and `chmod go-w` it"
            )

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self._path).free
        if free < size + _SPARE:
            raise CannotLayOut(
                f"the compile cache {self._name} has {free >> 20} MiB free, and {size >> 20} MiB would come: make room there"
            )

    def _clear(self) -> None:
        """What one that was killed, or that failed, has left. Nobody else is at work here, since this one has the lock."""
        for name in os.listdir(self._fd):  # noqa: PTH208 - of the folder that is held, whatever its path leads to now
            if name.startswith(APART):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self._fd)


def _write(target: Path, file: CacheFile, data: bytes) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as writing:
        writing.write(data)
        os.fchmod(fd, 0o600 | file.mode & 0o755)
        writing.flush()
        os.utime(fd, ns=(file.changed, file.changed))


def _missing(tree: _Tree, fd: int | None) -> Iterator[CacheFile]:
    """`fd`: of the folder, None where there is none. What is below something that is no folder is not missing: it cannot be put."""
    for name, file in tree.files.items():
        if fd is None or not _is_there(name, fd):
            yield file
    for name, inner in tree.folders.items():
        if fd is None or not _is_there(name, fd):
            yield from _missing(inner, None)
            continue
        with contextlib.suppress(NotADirectoryError, FileNotFoundError), _opened(name, fd) as folder:
            yield from _missing(inner, folder)


def _put(tree: _Tree, source: int, target: int) -> None:
    for name in tree.files:
        with contextlib.suppress(FileExistsError):  # an engine was faster
            os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    for name, inner in tree.folders.items():
        try:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        except OSError as error:
            if error.errno not in _THERE:
                raise
            with contextlib.suppress(NotADirectoryError), _opened(name, target) as there, _opened(name, source) as here:
                _put(inner, here, there)


@contextlib.contextmanager
def _opened(name: str, fd: int) -> Iterator[int]:
    """A folder in a folder. Raises NotADirectoryError: it is something else, as a link."""
    try:
        inner = os.open(name, _FOLDER, dir_fd=fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        raise
    try:
        yield inner
    finally:
        os.close(inner)


def _is_there(name: str, fd: int) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
