"""What a container has printed, from the file in which the node's runtime keeps it.

A capture's pod is gone once the capture has failed, and its log with it; so the agent reads in it why, as long as it is there.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path

from restore_agent.places.cgroups import node_process

_KEPT_BYTES = 128 << 10
_QUIET_SECONDS, _PATIENCE_SECONDS = 0.2, 2.0  # the runtime writes on after a program has ended
_LINE = re.compile(r"\S+ (?:stdout|stderr) (\S+) ?(.*)", re.DOTALL)  # CRI: time, stream, tags of which P is a part of a line, text


async def last_lines(log: str, root: Path | None = None) -> Sequence[str]:
    """The last lines of a file of the node's; none where it is not there. `root`: the node's, where it is not found by itself."""
    if not log:
        return ()
    path = (root or Path(node_process(), "root")) / log.lstrip("/")
    size = -1
    for _ in range(round(_PATIENCE_SECONDS / _QUIET_SECONDS)):
        if (now := await asyncio.to_thread(_size, path)) == size:
            break
        size = now
        await asyncio.sleep(_QUIET_SECONDS)
    return await asyncio.to_thread(_read, path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _read(path: Path) -> Sequence[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _KEPT_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    found, begun = [], ""
    for line in text.splitlines():
        if not (parsed := _LINE.fullmatch(line)):
            continue  # the first may be cut
        begun += parsed[2]
        if "P" not in parsed[1].split(":"):
            found.append(begun)
            begun = ""
    return [*found, begun] if begun else found
