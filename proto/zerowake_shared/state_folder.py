"""Who has a state folder: one `zerowake up` with its agent, or one agent.

Two locks, both the kernel's (flock), so that neither can be left behind by a process that was killed:
- `owner.lock` says whose the folder is. `zerowake up` holds it alone, before it touches anything else in there, and for as long as it runs.
  An agent that was started by hand shares it, and so keeps a `zerowake up` away; the one that `zerowake up` starts lives in its parent's.
- `lock` is the agent's, whoever started it: two of them never have one store.
Each holder writes who it is into its lock, for the message of whoever comes second. Sockets in the folder are the owner's to remove: with
the lock in hand whatever is there was left by somebody who is gone.
Rejected: a file with a process id (it outlives kill -9, and its number may be somebody else's by then); connecting to the sockets (whoever
is busy, or just starts, does not answer).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from zerowake_shared.port_holder import command_of

OWNER_LOCK, STORE_LOCK = "owner.lock", "lock"


class FolderInUse(Exception):
    """Somebody else has the folder; the message names who."""


class UnusableFolder(Exception):
    """Nothing can be kept there; the message says why."""


class Lock:
    """A lock file that is held. It is let go of by `close`, or when the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, shared: bool = False) -> Lock:
        """The lock, with this process's name in it unless it is shared. Raises: BlockingIOError: somebody has it; OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if not shared:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, made if it is not there, is this process's alone until the block ends.

    Raises:
        FolderInUse: it is another's. UnusableFolder: it cannot be made or written.
    """
    _make(folder)
    try:
        lock = Lock.take(folder / OWNER_LOCK)
    except BlockingIOError:
        raise FolderInUse(in_use(folder)) from None
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        yield
    finally:
        lock.close()


@contextlib.contextmanager
def used(folder: Path) -> Iterator[bool]:
    """The folder is an agent's, or a `zerowake up`'s whose child this is, until the block ends; yields whether it is a parent's.

    Raises:
        FolderInUse: a `zerowake up` has it. UnusableFolder: it cannot be made or written.
    """
    _make(folder)
    try:
        lock = Lock.take(folder / OWNER_LOCK, shared=True)
    except BlockingIOError:
        if _pid(folder / OWNER_LOCK) != os.getppid():
            raise FolderInUse(in_use(folder)) from None
        yield True
        return
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        yield False
    finally:
        lock.close()


def store_holder(folder: Path) -> str:
    """Whose the store is, such as `pid 812 (python …)`; empty: nobody's."""
    try:
        Lock.take(folder / STORE_LOCK, shared=True).close()
    except BlockingIOError:
        return holder_of(folder / STORE_LOCK) or "a process"
    return ""


def in_use(folder: Path) -> str:
    """Who has it, and what to do."""
    holder = ""
    with contextlib.suppress(OSError):
        try:
            Lock.take(folder / OWNER_LOCK, shared=True).close()
        except BlockingIOError:
            holder = holder_of(folder / OWNER_LOCK)  # held by one alone, whose name is in it
        else:
            holder = holder_of(folder / STORE_LOCK)
    by = f" by {holder}" if holder else ""
    return f"the state folder {folder} is in use{by}; stop that, or use another folder"


def holder_of(lock: Path) -> str:
    """Who has taken a lock for itself, or had, such as `pid 812 (python …)`; empty: nobody."""
    pid = _pid(lock)
    return f"pid {pid} ({command_of(pid)})" if pid else ""


def _pid(lock: Path) -> int:
    try:
        return int(lock.read_text() or 0)
    except (OSError, ValueError):
        return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> UnusableFolder:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UnusableFolder(f"the state folder {folder} cannot be used: it, or what it would lie in, is no folder; use another one")
    return UnusableFolder(f"the state folder {folder} cannot be used: {error.strerror}; make it writable, or use another folder")
