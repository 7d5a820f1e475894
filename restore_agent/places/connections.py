"""Who is connected to an engine, as the kernel shows it: the network of a process is its place's."""

from __future__ import annotations

import contextlib
from pathlib import Path

_ESTABLISHED = "01"
_LOCAL, _STATE, _INODE = 1, 3, 9  # fields of a line


def accepted(host_pid: int, port: int) -> int:
    """Connections to this port, in the network of that process, that its server has taken and whose clients are there still; 0 where the
    process has ended. Those that wait to be taken count nothing: no answer has begun on them."""
    count = 0
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{host_pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                count += fields[_LOCAL].endswith(f":{port:04X}") and fields[_STATE] == _ESTABLISHED and fields[_INODE] != "0"
    return count
