"""Who listens on a port of this machine, by what the kernel shows in /proc: for the message of whoever wanted it, too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_LISTENS = "0A"
_SHOWN = 60  # characters of a command


def port_holder(port: int) -> str:
    """Such as `pid 812 (nginx -g daemon off;)`; empty: nobody is found, or another user's processes cannot be looked into."""
    sockets = set(_listening(port))
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) in sockets:
                        return f"pid {process.name} ({command_of(int(process.name))})"
    return ""


def command_of(pid: int) -> str:
    """The beginning of a process's command; its name where it has none, and `ended` where there is no such process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
        names = [Path(word).name or word for word in words[:2]]  # of the program, and of its script if it is an interpreter
        shown = " ".join(" ".join([*names, *words[2:]]).split()) or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"


def _listening(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    yield f"socket:[{fields[9]}]"
