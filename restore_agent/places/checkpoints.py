"""Weights that an engine has published in its container, taken into its snapshot: the container goes, and they are lent to the next ones.

What a tenant names is data. It is a path within its container, reached through a view on which no link is followed; what is there is read
once, into a copy of the agent's, and only as plain files whose size was seen before. The copy is what is hashed, and what gpumem reads.

A copy that is taken of the engine's own layer takes the place of what is there: else the weights would be carried a second time, among
the files that the engine has written, and be too large for it. Rejected: a folder of the node that capture pods may write into, which no
limit of a pod's would count.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from restore_agent.errors import AgentError

_ENDS = (".safetensors", ".safetensors.index.json")  # what a checkpoint's files are called
_PIECE = 16 << 20
_SPARE_BYTES = 1 << 30  # of the node's disk


class CheckpointError(AgentError):
    """A checkpoint that an engine named cannot be taken into its snapshot."""

    reason = "sandbox-failed"


def take(root: Path, directory: Path, folder: Path, is_own: Callable[[Path], bool]) -> Path:
    """Copies a checkpoint to `folder`, and returns where it is there: a directory, or the one file that was named.

    Args:
        root: the container's file system, as the agent may walk it.
        directory: as the engine sees it.
        is_own: whether a file is of what the engine has written, so that it is removed there.

    Raises:
        CheckpointError: it holds no checkpoint, something else than files, or more than the node's disk has room for.
    """
    inside = PurePosixPath(os.path.normpath("/" + str(directory).lstrip("/")))
    try:
        files = _files(root, inside)
        sizes = {name: (root / name.relative_to("/")).lstat().st_size for name in files}
        folder.mkdir(parents=True)
        if (free := shutil.disk_usage(folder).free) < (needed := sum(sizes.values())) + _SPARE_BYTES:
            raise CheckpointError(f"the weights in {inside} have {needed >> 20} MiB, and {free >> 20} are free in the agent's state folder")
        for name, size in sizes.items():
            _copy(root / name.relative_to("/"), folder / name.name, size)
        for name in files:
            if is_own(Path(name)):
                (root / name.relative_to("/")).unlink()
    except OSError as error:
        raise CheckpointError(f"the weights in {inside} of the container cannot be read: {error.strerror}") from None
    return folder / inside.name if files == [inside] else folder


def _files(root: Path, inside: PurePosixPath) -> list[PurePosixPath]:
    """Of the checkpoint. Raises CheckpointError, OSError."""
    there = root / inside.relative_to("/")
    if stat.S_ISREG(there.lstat().st_mode):
        return [inside]
    found = sorted(inside / entry.name for entry in there.iterdir() if entry.name.endswith(_ENDS))
    if not found:
        raise CheckpointError(f"{inside} of the container, which its engine names as weights, holds no *.safetensors")
    return found


def _copy(source: Path, target: Path, size: int) -> None:
    """So many bytes of a file, on the disk when it returns. Raises CheckpointError, OSError."""
    with _plain(source) as reading, target.open("xb") as writing:
        left = size
        while left:
            sent = os.sendfile(writing.fileno(), reading, None, min(left, _PIECE))
            if not sent:
                raise CheckpointError(f"{source.name} became shorter while it was copied")
            left -= sent
        os.fsync(writing.fileno())


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError(f"{path.name} of the container, which its engine names as weights, is no file")
        yield fd
    finally:
        os.close(fd)
