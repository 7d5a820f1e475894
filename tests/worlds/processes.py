"""Processes as /proc shows them: which there are, what they hold, whether they live."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def below(pid: int) -> Iterator[tuple[int, int, str]]:
    """Every process under this one: its pid in its own pid namespace, its pid here, its command line."""
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        with suppress(OSError):  # it ended while we looked
            for task in Path(f"/proc/{pid}/task").iterdir():
                for child in map(int, (task / "children").read_text().split()):
                    waiting.append(child)
                    status = Path(f"/proc/{child}/status").read_text()
                    words = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    yield int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]), child, words


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


_OPENAT = {"x86_64": 257, "aarch64": 56}[platform.machine()]


def stands_in_open(pid: int, thread: int) -> bool:
    """Whether a thread of it waits in the kernel for a file to be opened."""
    try:
        return Path(f"/proc/{pid}/task/{thread}/syscall").read_text().split()[0] == str(_OPENAT)
    except OSError:
        return False


def descriptors(pid: int) -> list[str]:
    """What each of its file descriptors is of, as /proc names it. This process's own: collect what tests left to the garbage before."""
    links = []
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                links.append(str(entry.readlink()))
    return links


def resident(pid: int) -> int:
    """Bytes of memory; 0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0
