"""What of an engine's place a dump would leave behind without a word: CRIU dumps the tree under the engine's first process, and nothing of
the place's IPC namespace.

    a helper that daemonized    its parent is the place's pid 1, not the engine: it is outside of the tree
    System V objects            semaphores, message queues and shared memory; of these CRIU itself refuses only memory that is attached
    POSIX message queues        of these CRIU itself refuses only those that are open

A replica without them would be another engine than the one that was proved. So a capture looks, before it dumps, and refuses by name.
Rejected: making the engine's first process a subreaper, so that such helpers stay in its tree: few servers reap children that they do not
know, and each would then collect dead ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from restore_agent.errors import AgentError
from restore_agent.places.processes import command_line, descendants

_CLONE_NEWIPC = 0x08000000
_KINDS = {"sem": "semaphores", "msg": "message queue", "shm": "shared memory"}
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # system calls, by the numbers that they have everywhere
_FSCONFIG_CMD_CREATE, _CLOEXEC = 6, 1
_libc = ctypes.CDLL(None, use_errno=True)


class LeftBehind(AgentError):
    """An engine has something that no snapshot carries; the text says what, and the way out."""

    reason = "not-carried"


def ipc_objects(host_pid: int) -> frozenset[str]:
    """What that process's IPC namespace holds, in words; nothing where it has ended. Blocks. Raises OSError: nobody may look."""
    # Only who stands in the namespace sees them: a thread of its own goes in, and ends there.
    with ThreadPoolExecutor(1, "ipc") as pool:
        try:
            return pool.submit(_ipc_objects, host_pid).result()
        except (FileNotFoundError, ProcessLookupError):
            return frozenset()


def refuse_left_behind(root_pid: int, hosts: Mapping[int, int], before: frozenset[str]) -> None:
    """Blocks. An engine that has ended is somebody else's to tell.

    `root_pid`: the engine's first process. `hosts`: every process of the place, pid inside → on the host. `before`: `ipc_objects` as they
    were before the engine.

    Raises:
        LeftBehind: the engine has a process outside of its tree, or something in the IPC namespace.
        OSError: nobody may look.
    """
    root_host_pid = hosts.get(root_pid)
    if root_host_pid is None:
        return
    tree = set(descendants(root_host_pid).values())
    strays = [(pid, host) for pid, host in sorted(hosts.items()) if pid != 1 and host not in tree]
    named = [f"pid {pid} ({command})" for pid, host in strays if (command := _command(host))]
    if named:
        raise LeftBehind(
            f"the engine has started what is no longer below it, and what no snapshot carries: {_list(named)}; "
            "have it stay in the foreground (no daemon, no `setsid`/`nohup … &` of a shell that ends), as a child of the engine"
        )
    if made := sorted(ipc_objects(root_host_pid) - before):
        raise LeftBehind(
            f"the engine keeps something in the kernel that no snapshot carries: {_list(made)}; "
            "have it use POSIX semaphores and shared memory (/dev/shm), pipes or sockets instead"
        )


def _ipc_objects(host_pid: int) -> frozenset[str]:
    namespace = os.open(f"/proc/{host_pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _done(_libc.setns(namespace, _CLONE_NEWIPC), f"enter the IPC namespace of pid {host_pid}")
    finally:
        os.close(namespace)
    found = {f"POSIX message queue /{name}" for name in _queues()}
    for kind, words in _KINDS.items():
        head, *rows = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        fields = head.split()
        for row in rows:
            values = dict(zip(fields, row.split(), strict=False))
            found.add(f"System V {words} {values.get(f'{kind}id') or values['msqid']} (key {int(values['key']) & 0xFFFFFFFF:#x})")
    return frozenset(found)


def _queues() -> list[str]:
    """Of the namespace in which this thread stands: its file system, mounted nowhere. None where the kernel has no such thing."""
    context = _libc.syscall(_FSOPEN, b"mqueue", _CLOEXEC)
    if context < 0:
        return []
    try:
        _done(_libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "look at message queues")
        mounted = _done(_libc.syscall(_FSMOUNT, context, _CLOEXEC, 0), "look at message queues")
    finally:
        os.close(context)
    try:
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mounted)
    finally:
        os.close(mounted)
    try:
        return os.listdir(folder)  # noqa: PTH208  (a descriptor, not a path)
    finally:
        os.close(folder)


def _done(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"cannot {what}: {os.strerror(ctypes.get_errno())}")
    return result


def _command(host: int) -> str:
    """Empty: it has ended, or is dead and waits to be reaped."""
    with contextlib.suppress(OSError):
        return command_line(host)
    return ""


def _list(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
