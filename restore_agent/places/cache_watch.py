"""Which files of its compile caches an engine uses while it starts: what it writes there, and what it reads of what was there before.

Written is what is new or another file than before, by two looks at the folders. What is read the kernel tells (inotify), of the folders
that are there as the watch begins: only in files of new folders nobody could have read before. Where it does not tell (too many folders,
or events that were lost) all that is there counts as used. What other programs read meanwhile counts, too.

Rejected: times of access (file systems are mounted without), all of the caches (a machine's have every model's), and fanotify, which tells
of a whole file system, or wants each file opened by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

_OPEN, _OVERFLOW, _IS_FOLDER = 0x20, 0x4000, 0x4000_0000
_ONLY_FOLDERS, _NO_LINKS = 0x0100_0000, 0x0200_0000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name
_MOST_FOLDERS = 32_768
_READ = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)
_Identity = tuple[int, int, int]


class CacheWatch:
    """Of one engine. Use `with await CacheWatch.begun(folders)` in the loop, before the engine starts."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = folders
        self._before: dict[str, dict[str, _Identity]] = {}
        self._watches: dict[int, tuple[str, str]] = {}  # → variable and folder within it
        self._read: dict[str, set[str]] = {variable: set() for variable in folders}
        self._told = True  # of all that is read
        self._fd = -1

    @classmethod
    async def begun(cls, folders: Mapping[str, Path]) -> CacheWatch:
        """`folders`: variable → a cache's folder, as the engine will see it and the agent reaches it; it may be missing."""
        watch = cls(folders)
        try:
            await asyncio.to_thread(watch._begin)
        except BaseException:
            watch.close()
            raise
        if watch._fd >= 0:
            asyncio.get_running_loop().add_reader(watch._fd, watch._drain)
        return watch

    def __enter__(self) -> CacheWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(RuntimeError):  # no loop runs any more
                asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def used(self) -> dict[str, list[str]]:
        """Variable → the files of that cache that were written or read since the watch has begun, by their paths in it."""
        self._drain()
        return await asyncio.to_thread(self._used)

    def _begin(self) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._told = self._fd >= 0
        for variable, folder in self.folders.items():
            files = self._before[variable] = {}
            for inner, names in _walk(folder):
                self._watch(variable, folder, inner)
                files |= {name: identity for name, identity in _identities(folder, inner, names)}

    def _watch(self, variable: str, folder: Path, inner: str) -> None:
        if not self._told or len(self._watches) >= _MOST_FOLDERS:
            self._told = False
            return
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(folder / inner), _OPEN | _ONLY_FOLDERS | _NO_LINKS)
        if watch >= 0:
            self._watches[watch] = variable, inner
        elif (folder / inner).is_dir():  # else it has gone
            self._told = False

    def _drain(self) -> None:
        """Returns at once."""
        while self._fd >= 0:
            try:
                events = os.read(self._fd, _READ)
            except BlockingIOError:
                return
            at = 0
            while at < len(events):
                watch, mask, _, length = _EVENT.unpack_from(events, at)
                name = os.fsdecode(events[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
                at += _EVENT.size + length
                if mask & _OVERFLOW:
                    self._told = False
                elif name and not mask & _IS_FOLDER and watch in self._watches:
                    variable, inner = self._watches[watch]
                    self._read[variable].add(_joined(inner, name))

    def _used(self) -> dict[str, list[str]]:
        used = {}
        for variable, folder in self.folders.items():
            before, read = self._before.get(variable, {}), self._read[variable]
            used[variable] = [
                name
                for inner, names in _walk(folder)
                for name, identity in _identities(folder, inner, names)
                if not self._told or name in read or before.get(name) != identity
            ]
        return used


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder in it, by its path within, and the files there."""
    for at, _, names in os.walk(folder):
        inner = os.path.relpath(at, folder)
        yield ("" if inner == "." else inner), names


def _identities(folder: Path, inner: str, names: list[str]) -> Iterator[tuple[str, _Identity]]:
    for name in names:
        path = _joined(inner, name)
        with contextlib.suppress(OSError):  # it has gone
            found = (folder / path).lstat()
            if stat.S_ISREG(found.st_mode):
                yield path, (found.st_ino, found.st_size, found.st_mtime_ns)


def _joined(inner: str, name: str) -> str:
    return f"{inner}/{name}" if inner else name
