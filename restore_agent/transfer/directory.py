"""A store in a folder: of this machine, of a volume, of anything that is mounted.

An object is a file that was written under a name with a dot in front, synced and renamed, so one that is there is whole. Reading goes
around the page cache where the file is not in it: what is fetched once would only drive others out. Each call's work on the disk is done in
threads of the store's own, since a network disk may hang for minutes, and the event loop's common threads have other work.

What the system says becomes one of the words of source.py. A folder that is not there at all is unreachable, not empty: a volume that was
not mounted would look like a store without snapshots.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gpumem.filler.files import BLOCK, File
from gpumem.wire.errors import Corrupt
from restore_agent.transfer.layout import CHUNKS, LEASES, NAMES, SNAPSHOTS
from restore_agent.transfer.source import Absent, Denied, Full, Piece, Stored, TransferError, Unreachable
from restore_agent.transfer.spare_memory import PIECE, SpareMemory
from zerowake_shared.durable import sync_folder

_THREADS = 16
_PARTIAL = "."  # first letter of a file that is being written
_LEFT = re.compile(r"\..+\.[a-z0-9_]{8}")  # a file that was being written
_T = TypeVar("_T")
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Directory:
    """A Destination below a folder of this machine. `close` it: it has threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spare = SpareMemory(PIECE)
        self._threads = ThreadPoolExecutor(_THREADS, f"store {folder.name}")

    def __str__(self) -> str:
        return f"file://{self._folder}"

    async def close(self) -> None:
        """Does not wait for calls that hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        """See Source."""
        path, end = self._path(key), offset + length
        memory = self._spare.take()
        while True:
            count = await self._do(path, functools.partial(_read, path, offset, memory[: min(PIECE, end - offset)], memory))
            if count:
                try:
                    yield memory[:count]
                except BaseException:
                    self._spare.give(memory)
                    raise
            offset += count
            if not count or offset == end:
                self._spare.give(memory)
                return

    async def size(self, key: str) -> int:
        """See Source."""
        path = self._path(key)
        return await self._do(path, lambda: path.stat().st_size)

    async def objects(self, prefix: str) -> AsyncIterator[Stored]:
        """See Source."""
        async for stored in self._all(prefix, lambda name: not name.startswith(_PARTIAL)):
            yield stored

    async def unfinished(self) -> AsyncIterator[Stored]:
        """See Destination."""
        for prefix in (NAMES, SNAPSHOTS, CHUNKS, LEASES):
            async for stored in self._all(prefix, lambda name: bool(_LEFT.fullmatch(name))):
                yield stored

    async def _all(self, prefix: str, wanted: Callable[[str], bool]) -> AsyncIterator[Stored]:
        top = self._path(prefix) if prefix else self._folder
        await self._do(self._folder, self._folder.stat)
        for folder in await self._do(top, lambda: [Path(found) for found, _, _ in os.walk(top, onerror=_unless_gone)]):
            for stored in await self._do(folder, functools.partial(self._files, folder, wanted)):
                yield stored

    async def put(self, key: str, data: Piece) -> None:
        """See Destination."""
        path = self._path(key)
        await self._do(path, functools.partial(self._write, path, data))

    async def remove(self, key: str) -> None:
        """See Destination."""
        path = self._path(key)
        with contextlib.suppress(Absent):
            await self._do(path, path.unlink)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise Denied(f"{key!r} is no key of a store: it would lead out of {self}")
        return self._folder.joinpath(*parts)

    async def _do(self, path: Path, work: Callable[[], _T]) -> _T:
        """In a thread of the store's own. A call whose caller has gone ends by itself, later."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except OSError as error:
            raise self._word(path, error) from None

    def _word(self, path: Path, error: OSError) -> TransferError:
        what = f"{path}: {os.strerror(error.errno) if error.errno else error}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            if not self._folder.is_dir():
                return Unreachable(f"{self} is not there: mount it, or make the folder {self._folder}")
            return Absent(f"{self} has no {path.relative_to(self._folder)}")
        if error.errno in _DENIED:
            return Denied(f"{self} does not let us: {what}; give the user that the agent runs as the right to it")
        if error.errno in _FULL:
            return Full(f"{self} is full: {what}; make room there, or use another store")
        return Unreachable(f"{self} failed: {what}")

    def _write(self, path: Path, data: Piece) -> None:
        self._folder.stat()  # else a volume that is not mounted would be written beside
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{_PARTIAL}{path.name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # a store is read by other users of other machines
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        sync_folder(path.parent)

    def _files(self, folder: Path, wanted: Callable[[str], bool]) -> list[Stored]:
        found: list[Stored] = []
        with contextlib.suppress(FileNotFoundError):  # it went as it was listed
            for entry in os.scandir(folder):
                if wanted(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat(follow_symlinks=False)
                        found.append(Stored(str(Path(entry.path).relative_to(self._folder)), stat.st_size, stat.st_mtime))
        return found


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _read(path: Path, offset: int, target: memoryview, memory: memoryview) -> int:
    """Fills `target`, the beginning of `memory`, as far as the file goes; returns the bytes."""
    with contextlib.closing(File.of(os.open(path, os.O_RDONLY | os.O_CLOEXEC))) as file:
        count = max(0, min(len(target), os.fstat(file.fd).st_size - offset))
        try:
            file.read(offset, target[:count], memory[: -(-count // BLOCK) * BLOCK] if not offset % BLOCK else None)
        except Corrupt:
            raise OSError(errno.EIO, "it became shorter as it was read") from None
        return count
