"""Compile caches of a snapshot's engine, as they travel with it: for the cold starts where the snapshot itself does not fit.

    caches/index.json     which files: of which cache, where in it, mode and time of change
    caches/000000 …       their contents, one behind the other, cut into pieces of at most PIECE bytes

Both are small files of the snapshot. So its signed manifest names them by their hashes, and whatever carries, verifies, keeps or removes
a snapshot does so with them. No restore reads them.

What is in such a cache is code that an engine runs. So nothing is taken from an index but plain files below the cache's own folder: a path
that leads out of it, a link, a device, a bit that gives rights make all of it invalid. Nobody compares what a cache fits: engines key what
they cache by all that it depends on, and do not look at the rest. The time of change travels along, since ninja compares it.

Rejected: an object for each file (an engine has thousands, and a request for each would cost more than its bytes), and a tar (its times of
change are rounded, and what it may hold is more than what is wanted here).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from restore_agent.errors import AgentError

FOLDER = "caches"
INDEX = f"{FOLDER}/index.json"
PIECE = 4 << 20  # bytes
MAX_BYTES, MAX_FILES = 256 << 20, 20_000  # of one snapshot's caches in all
_DEEPEST = 64  # folders
_LONGEST = 255  # bytes of a name, as file systems have it


class InvalidCaches(AgentError):
    """What a snapshot says of its compile caches is nothing that a node lays out."""

    reason = "corrupt"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheFile(_Record):
    """A file of a cache: its path within the cache's folder, its mode (rights alone) and its time of change (nanoseconds)."""

    path: str
    size: int = Field(ge=0, le=MAX_BYTES)
    mode: int = Field(ge=0, le=0o777)
    changed: int = Field(ge=0, lt=1 << 63)

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        names = path.split("/")
        if len(names) > _DEEPEST or any(not _is_name(name) for name in names):
            raise ValueError(f"{path[:200]!r} is no path within a cache")
        return path


class Cache(_Record):
    """One cache, by the variable that names its folder (`places/compile_folders.py`), in the order of its contents."""

    variable: str = Field(pattern="^[A-Z][A-Z0-9_]{0,63}$")
    files: tuple[CacheFile, ...]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        """A file has one content, and is no folder of another."""
        files = {file.path for file in self.files}
        folders = {str(folder) for path in files for folder in PurePosixPath(path).parents}
        if len(files) != len(self.files) or files & folders:
            raise ValueError(f"{self.variable} has two files of one path, or a file that is a folder, too")
        return self


class CacheIndex(_Record):
    """All caches of a snapshot."""

    version: Literal[1] = 1
    caches: tuple[Cache, ...]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        files = [file for cache in self.caches for file in cache.files]
        if len(files) > MAX_FILES or sum(file.size for file in files) > MAX_BYTES:
            raise ValueError(f"there are more than {MAX_FILES} files, or than {MAX_BYTES >> 20} MiB")
        if len({cache.variable for cache in self.caches}) != len(self.caches):
            raise ValueError("a cache is there twice")
        return self

    @property
    def size(self) -> int:
        return sum(file.size for cache in self.caches for file in cache.files)

    def encode(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> CacheIndex:
        """Raises InvalidCaches."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidCaches(f"its compile caches are not laid out: {error.errors()[0]['msg']}") from None


def is_cache(name: str) -> bool:
    """Whether a snapshot's file of that name is of its compile caches."""
    return name.startswith(f"{FOLDER}/")


def keep(workspace: Path, found: Mapping[str, tuple[Path, Iterable[str]]]) -> tuple[CacheIndex, list[str]]:
    """Writes caches into the folder that becomes a snapshot's; and says in words what was left out. Blocks.

    Args:
        found: variable → the cache's folder, as the agent reaches it, and the files of it that are wanted. What is none by now, or no plain
            file, is left out without a word: caches have locks and half-written files.

    Raises OSError.
    """
    pieces = _Pieces(workspace / FOLDER)
    caches, notes, left, count = [], [], MAX_BYTES, MAX_FILES
    for variable, (folder, names) in sorted(found.items()):
        files = _plain(folder, names)
        size = sum(at.st_size for _, at in files)
        if size > left or len(files) > count:
            notes.append(
                f"the compile cache {variable} is not in the snapshot: the engine uses {len(files)} files of it, {size >> 20} MiB, and a "
                f"snapshot takes {MAX_FILES} and {MAX_BYTES >> 20} MiB of all caches. Where the snapshot does not fit, it is compiled anew"
            )
            continue
        kept = [entry for path, at in files if (entry := _kept(pieces, folder, path, at)) is not None]
        if kept:
            caches.append(Cache(variable=variable, files=tuple(kept)))
            left, count = left - sum(entry.size for entry in kept), count - len(kept)
    index = CacheIndex(caches=tuple(caches))
    if caches:
        pieces.close()
        (workspace / INDEX).write_bytes(index.encode())
    return index, notes


def contents(index: CacheIndex, read: Callable[[str], bytes]) -> Iterator[tuple[str, CacheFile, bytes]]:
    """Every file of it, in its order, with its variable and content.

    Args:
        read: a file of the snapshot, verified, by its name.

    Raises InvalidCaches: the pieces hold less or more than the index says; and what `read` does.
    """
    pieces = (read(_piece(number)) for number in range(-(-index.size // PIECE)))
    held = bytearray()
    for cache in index.caches:
        for file in cache.files:
            while len(held) < file.size:
                piece = next(pieces, b"")
                if not piece or len(piece) > PIECE:
                    raise InvalidCaches("its compile caches are not laid out: their contents are shorter than their index says")
                held += piece
            data = bytes(held[: file.size])
            del held[: file.size]
            yield cache.variable, file, data
    if held:
        raise InvalidCaches("its compile caches are not laid out: their contents are longer than their index says")


class _Pieces:
    """Contents on their way into pieces."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = bytearray()
        self._count = 0

    def add(self, data: bytes) -> None:
        self._held += data
        while len(self._held) >= PIECE:
            self._write(self._held[:PIECE])
            del self._held[:PIECE]

    def close(self) -> None:
        self._folder.mkdir(exist_ok=True)  # all files may be empty
        if self._held:
            self._write(self._held)

    def _write(self, data: bytearray) -> None:
        self._folder.mkdir(exist_ok=True)
        (self._folder.parent / _piece(self._count)).write_bytes(data)
        self._count += 1


def _piece(number: int) -> str:
    return f"{FOLDER}/{number:06d}"


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and "\0" not in name and len(name.encode()) <= _LONGEST


def _plain(folder: Path, names: Iterable[str]) -> list[tuple[str, os.stat_result]]:
    """Those that are plain files with names that an index can have, and their state now."""
    found = []
    for name in sorted(set(names)):
        try:
            at = (folder / name).lstat()
            CacheFile(path=name, size=min(at.st_size, MAX_BYTES), mode=at.st_mode & 0o777, changed=at.st_mtime_ns)
        except (OSError, ValueError, UnicodeError):
            continue
        if stat.S_ISREG(at.st_mode):
            found.append((name, at))
    return found


def _kept(pieces: _Pieces, folder: Path, name: str, at: os.stat_result) -> CacheFile | None:
    """None: it has gone, or is another one by now."""
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        if os.fstat(fd).st_ino != at.st_ino:
            return None
        data = file.read(at.st_size + 1)
    if len(data) != at.st_size:
        return None
    pieces.add(data)
    return CacheFile(path=name, size=at.st_size, mode=at.st_mode & 0o777, changed=at.st_mtime_ns)
