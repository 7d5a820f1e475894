"""What a process had too little of for a moment, in words: no bug, and nothing is wrong with what it was asked."""

from __future__ import annotations

import errno


def lack(error: BaseException, who: str) -> str:
    """Of what, and what to do. `who`: the process, as people call it. Empty: the error is another one."""
    number = error.errno if isinstance(error, OSError) else 0
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return f"{who} may have no more memory: let it have more, or ask again later"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):  # CPython has no class of its own for it
        return f"{who} can start no more threads: raise its limit of processes (systemd: TasksMax), or ask again later"
    if number == errno.EMFILE:
        return f"{who} has no descriptor left: raise its limit of open files (systemd: LimitNOFILE), or ask again later"
    if number == errno.ENFILE:
        return "this machine has no descriptor left: raise its limit of open files (sysctl fs.file-max), or ask again later"
    return ""
