"""What this node knows of the content of its files: the hash of each that was read, for as long as the kernel says that it is the same.

Snapshots name files by their content, and a restore compares hundreds of them. A file whose inode, size and time of its last change are
those of an earlier look has the content that it had then; ctime, unlike mtime, nobody can set back. So a restore costs one stat for each
file, and only what is new on the node is read.

What is known is kept in a file of the node's own, which travels nowhere and may be lost at any time: then the files are read once more.
Rejected: the identities in the manifest, which would be true of one node alone; extended attributes, which images and read-only mounts
do not let us write.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path

from blake3 import blake3

from zerowake_shared import durable

_NODE = Path("/")
_LARGE = 64 << 20
_PIECE = 4 << 20
_KEPT = 8192

_Key = tuple[str, int, int, int]  # path, inode, ctime in ns, size


class FileHashes:
    """Its calls block on the disk; any number of threads may make them."""

    def __init__(self, kept: Path | None = None) -> None:
        """`kept`: the file that holds what is known; None: this process alone knows it."""
        self._kept = kept
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, str] = OrderedDict()
        self._is_new = False
        if kept is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):  # torn, or another version's: what it said is read anew
                for path, inode, changed, size, found in json.loads(kept.read_bytes()):
                    self._known[str(path), int(inode), int(changed), int(size)] = str(found)

    def of(self, root: Path, path: Path | str) -> tuple[int, str]:
        """Size and BLAKE3 (hex) of a file. `path`: within `root`, which has another path for each container. Raises OSError."""
        there, stat = _looked_at(root, str(path))
        return stat.st_size, self._hash_of(root, str(path), there, stat)

    def match(self, root: Path, path: str, size: int, expected: str) -> bool:
        """Whether a file has this size and this BLAKE3: one of another size is not read. Raises OSError."""
        there, stat = _looked_at(root, path)
        return stat.st_size == size and self._hash_of(root, path, there, stat) == expected

    def _hash_of(self, root: Path, path: str, there: str, stat: os.stat_result) -> str:
        is_ours = root == _NODE
        # Volumes are their pods', with whatever numbers their makers chose: they say nothing of the node's own files.
        key = (path if is_ours else f"container:{path}", stat.st_ino, stat.st_ctime_ns, stat.st_size)
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        found = _hash(Path(there), stat.st_size, trusted=is_ours)
        with self._lock:
            self._known[key] = found
            self._is_new = True
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return found

    def keep(self) -> None:
        """Writes down what was read since the last time. A disk that refuses is none of the caller's trouble: files are read again."""
        with self._lock:
            if self._kept is None or not self._is_new:
                return
            self._is_new = False
            data = json.dumps([[*key, found] for key, found in self._known.items()])
        with contextlib.suppress(OSError):
            self._kept.parent.mkdir(exist_ok=True, mode=0o700)
            durable.replace(self._kept, data.encode())


def _looked_at(root: Path, path: str) -> tuple[str, os.stat_result]:
    """The file's path on the node, and its numbers. A restore asks for hundreds: as text, since a Path costs more than the call."""
    there = f"{str(root).rstrip('/')}/{path.lstrip('/')}"
    return there, os.stat(there)  # noqa: PTH116


def _hash(path: Path, size: int, *, trusted: bool) -> str:
    """`trusted`: nobody will truncate the file while it is hashed, so that it can be mapped (a truncated mapping kills its reader)."""
    hasher = blake3(max_threads=blake3.AUTO) if size > _LARGE else blake3()
    if trusted:
        return hasher.update_mmap(path).hexdigest()
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        while data := file.read(_PIECE):
            hasher.update(data)
    return hasher.hexdigest()
