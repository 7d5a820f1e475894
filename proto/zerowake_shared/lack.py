"""What a process had too little of for a moment, in words: no bug, and nothing is wrong with what it was asked."""

from __future__ import annotations

import errno
import threading

_PASSING = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT})


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


def passes(error: BaseException | None) -> bool:
    """Whether the error is for want of something that may be there again in a moment: descriptors, memory, processes, room on a disk."""
    return isinstance(error, OSError) and error.errno in _PASSING


def startable_threads(count: int) -> int:
    """How many of so many threads can be started now, beside each other. They have ended when this returns.

    Libraries of C++ and Rust start theirs at their first use, and take a failure for something that cannot be: gRPC waits for ever for a
    thread that there is not, and obstore is broken for as long as the process lives. So who uses one for the first time asks here before.
    """
    let_go = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=let_go.wait)
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        pass  # the answer says so
    finally:
        let_go.set()
        for thread in started:
            thread.join()
    return len(started)
