"""Weights that an engine has published in its container, taken into its snapshot: the container goes, and they are lent to the next ones.

What a tenant names is data. It is a path within its container, in which links are followed as far as they stay there (inner_path.py), and
those of the checkpoint's own files as far as they stay in their volume: a Hugging Face cache has its files apart, and links to them. What
is there is read once, into a copy of the agent's, and only as plain files whose size was seen before. The copy is what is hashed, and what
gpumem reads.

A copy that is taken of the engine's own layer takes the place of what is there: else the weights would be carried a second time, among
the files that the engine has written, and be too large for it. Rejected: a folder of the node that capture pods may write into, which no
limit of a pod's would count.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from restore_agent.errors import AgentError
from restore_agent.places.inner_path import InnerPath

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
        CheckpointError: it holds no checkpoint, something else than files, a link out of its volume, or more than the node's disk has room
            for.
    """
    inside = PurePosixPath("/" + str(directory).lstrip("/"))
    try:
        with contextlib.ExitStack() as opened:
            named = opened.enter_context(InnerPath.found(root, inside))
            alone = stat.S_ISREG(named.status.st_mode)
            there = opened.enter_context(InnerPath.found(root, inside.parent)) if alone else named
            names = [inside.name] if alone else sorted(name for name in there.names() if name.endswith(_ENDS))
            if not names:
                raise CheckpointError(f"{inside} of the container, which its engine names as weights, holds no *.safetensors")
            files = {name: opened.enter_context(InnerPath.found(root, there.path / name)) for name in names}
            for name, file in files.items():
                if file.mount != there.mount:
                    raise CheckpointError(
                        f"{there.path / name} of the container, which its engine names as weights, leads to {file.path} in another volume;"
                        " have all files of a checkpoint in one"
                    )
            sizes = {name: file.status.st_size for name, file in files.items()}
            folder.mkdir(parents=True)
            if (free := shutil.disk_usage(folder).free) < (needed := sum(sizes.values())) + _SPARE_BYTES:
                raise CheckpointError(
                    f"the weights in {inside} have {needed >> 20} MiB, and {free >> 20} are free in the agent's state folder"
                )
            for name, file in files.items():
                _copy(file, folder / name, sizes[name])
            for name, file in files.items():
                _remove(there, name, file, is_own)
    except OSError as error:
        raise CheckpointError(f"the weights in {inside} of the container cannot be read: {error.strerror}") from None
    return folder / inside.name if alone else folder


def _copy(source: InnerPath, target: Path, size: int) -> None:
    """So many bytes of a file, on the disk when it returns. Raises CheckpointError, OSError."""
    if not stat.S_ISREG(source.status.st_mode):
        raise CheckpointError(f"{source.path} of the container, which its engine names as weights, is no file")
    with source.reading() as reading, target.open("xb") as writing:
        left = size
        while left:
            sent = os.sendfile(writing.fileno(), reading, None, min(left, _PIECE))
            if not sent:
                raise CheckpointError(f"{source.path} became shorter while it was copied")
            left -= sent
        os.fsync(writing.fileno())


def _remove(directory: InnerPath, name: str, file: InnerPath, is_own: Callable[[Path], bool]) -> None:
    """What the engine has written of it: a file, or a link and what it leads to."""
    link = directory.path / name
    own, file_is_own = is_own(Path(link)), is_own(Path(file.path))
    with contextlib.suppress(FileNotFoundError):  # two links to one file
        if own:
            directory.remove(name)
        if file_is_own and file.path != link:
            file.remove_itself()
