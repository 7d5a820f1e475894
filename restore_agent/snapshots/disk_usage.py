"""What files take of a disk."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCK = 512  # bytes, in which the kernel counts what a file takes


def bytes_below(folder: Path) -> int:
    """What all files below it take, each once for each of its names; 0: there is no such folder. What goes meanwhile counts or not."""
    found, folders = 0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        found += entry.stat(follow_symlinks=False).st_blocks * _BLOCK
        except FileNotFoundError:
            continue
    return found
