"""The end of folders that nobody has a use for, also where they cannot be removed at once."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

_left: set[Path] = set()  # that could not be removed when their time had come
_changing = threading.Lock()


def discard(folder: Path) -> None:
    """Removes it with all that is in it, if it is there. Blocks; may be called from any thread.

    What cannot be removed now, as by a process that has no descriptor left to open it with, goes with the next one that is discarded.
    """
    with _changing:
        waiting = {folder, *_left}
    for each in waiting:
        shutil.rmtree(each, ignore_errors=True)
        with _changing:
            if each.exists():
                _left.add(each)
            else:
                _left.discard(each)
