"""Small files that are on the disk, whole, once a call returns: a crash leaves the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from zerowake_shared.clock import SYSTEM_CHANCE, token


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """A new file, which nobody may read beyond `mode` at any moment. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    """In the place of what is there, if anything is. Raises OSError: then that is still there."""
    fresh = path.with_name(f".{path.name}.{token(SYSTEM_CHANCE, 4)}")
    try:
        write(fresh, data, mode)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What was made, renamed or removed in it stays so. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Every file below it, and every name of one. Raises OSError."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            if (file := Path(path, name)).is_file() and not file.is_symlink():
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        sync_folder(Path(path))


def content(path: Path) -> bytes | None:
    """None: there is no such file. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None
