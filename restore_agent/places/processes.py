"""Processes as the kernel shows them under /proc, by their pids on this host: the only file that reads their `status`, `stat` and
`smaps_rollup`."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_PIDFD_GETFD = 438
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def ends_with(parent: int, number: int) -> bool:
    """From now on this process gets the signal when `parent`, whose child it is, ends, however that ends. False: it has ended already."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    return os.getppid() == parent


_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12  # fields of `stat`, counted from the one behind the program's name


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status: what stands behind each name. Raises OSError: it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def descendants(pid: int) -> dict[int, int]:
    """This process and all below it: pid in their own pid namespace → pid here. It reads a file of each of their threads."""
    return dict(_tree(pid))


def descendant(pid: int, inside: int) -> int | None:
    """The one of them that knows itself by that pid; None: there is none. What is near the first process is found at once."""
    return next((host for known, host in _tree(pid) if known == inside), None)


def _tree(pid: int) -> Iterator[tuple[int, int]]:
    """Of each: pid in its own pid namespace, and pid here. A process comes before its threads are looked at."""
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        try:
            yield pid_inside(status(pid)), pid
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it ended while we looked


def pid_inside(of: dict[str, str]) -> int:
    """The pid that a process knows itself by, from its status."""
    return int(of["NSpid"].split()[-1])


def command_line(pid: int) -> str:
    """Its words, parted by blanks; empty of a kernel thread and of what is dead. Raises OSError: it has ended."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()


def resident_bytes(pid: int) -> int:
    """0 of a process without memory (a zombie). Raises OSError: it has ended."""
    return int(status(pid).get("VmRSS", "0 kB").split()[0]) << 10


def private_bytes(pids: Iterable[int]) -> int:
    """Of memory that is no file's, also where it is swapped out; of what processes share since one is the other's fork, each has a part.
    Those that have ended have none."""
    size = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
            size += sum(int(found[name].split()[0]) << 10 for name in ("Pss_Anon", "SwapPss"))
    return size


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that these processes have used; those that have ended count nothing."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = _stat(Path(f"/proc/{pid}"))
            ticks += int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
    return ticks / os.sysconf("SC_CLK_TCK")


def is_stopped(pid: int) -> bool:
    """Whether every task of the process stands still, or it has ended."""
    try:
        return all(_stat(task)[_STATE] in "TtZX" for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False  # a task ended meanwhile: look again


def has_ended(pid: int) -> bool:
    """Whether nothing runs any more, be it reaped or not."""
    try:
        return _stat(Path(f"/proc/{pid}"))[_STATE] in "ZX"
    except OSError:
        return True


def taken_over(pidfd: int, fd: int) -> int:
    """What another process has open as `fd`, open here as well: a descriptor that the caller closes. Raises OSError."""
    copy = int(_libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copy


def _stat(folder: Path) -> list[str]:
    """The program's name before these fields may hold anything, also blanks and brackets."""
    return (folder / "stat").read_text().rpartition(")")[2].split()
