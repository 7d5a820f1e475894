"""Transparent huge pages, switched on for a moment: whoever touches much memory in it faults 2 MiB at a time.

The switches are the whole machine's, so each is put back to what it was by the last of all who hold it on, in this process or another.
What it was is noted in a file before it is changed, and every process that holds it on has a shared lock (flock) on that file, which the
kernel takes away with the process. A process that is killed thus leaves a note that nobody has locked: the next one to start, or to stop
holding it, puts the switch back. Whoever gets the lock for itself alone knows that nobody else is left.

This works among processes that use the same folder. Those of different folders do not hear of each other: the second finds the switch on,
so it changes and notes nothing, and may go on with small pages when the first is done. The switch ends as it was in any case.

Rejected: a count of the users in the file (a kill leaves it too high), and MADV_HUGEPAGE in the mappings of a process that is restored,
which needs no switch: the process would keep it, and grow by it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from zerowake_shared.lack import passes

SWITCHES = Path("/sys/kernel/mm/transparent_hugepage")
_LONGEST = 16  # bytes of a setting; it is noted in one write, at its full length, so that a kill leaves no half of it

logger = logging.getLogger(__name__)


class HugePages:
    """One switch of the kernel's. Any thread may hold it on, as often as it likes."""

    def __init__(self, folder: Path, switch: Path, on: str, instead_of: Sequence[str]) -> None:
        """Puts the switch back, if whoever held it on last was killed.

        Args:
            folder: for the note of what the switch was.
            on: the setting to hold.
            instead_of: settings that it is better than; others are left as they are.
        """
        self._note = folder / f"hugepages-{switch.name}"
        self._switch = switch
        self._on = on
        self._instead_of = frozenset(instead_of)
        self._lock = threading.Lock()
        self._users = 0
        self._file = -1  # the note, locked, while there are users
        self._works = os.access(switch, os.W_OK)
        if not self._works and switch.exists() and self._now() in self._instead_of:
            logger.warning("%s cannot be set here, so memory is made of small pages, which is slower: run as root to change that", switch)
        if self._works and self._note.exists():
            self._begin(os.O_RDWR)
            self._end()

    @classmethod
    def of_processes(cls, folder: Path) -> HugePages:
        """For the private memory of processes that have not asked for huge pages: `always`, as a restore wants it."""
        return cls(folder, SWITCHES / "enabled", "always", ("madvise", "never"))

    @classmethod
    def of_memfds(cls, folder: Path) -> HugePages:
        """For shared memory that asks for huge pages (MADV_HUGEPAGE): `advise` where the machine says `never`."""
        return cls(folder, SWITCHES / "shmem_enabled", "advise", ("never",))

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Holds the switch on. Where the kernel has none, or refuses, memory only comes more slowly."""
        with self._lock:
            self._users += 1
            if self._users == 1 and self._works:
                self._begin(os.O_RDWR | os.O_CREAT)
                self._set()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._end()

    def _begin(self, flags: int) -> None:
        with self._tried():
            self._file = os.open(self._note, flags | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_SH)  # waits only while another process puts the switch back

    def _set(self) -> None:
        with self._tried():
            before = self._now()
            if self._file >= 0 and before in self._instead_of:
                os.pwrite(self._file, before.ljust(_LONGEST).encode(), 0)
                self._switch.write_text(self._on)

    def _end(self) -> None:
        if self._file < 0:
            return
        try:
            with self._tried(), contextlib.suppress(BlockingIOError):  # others still hold it on: the last of them puts it back
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                before = os.pread(self._file, _LONGEST, 0).decode().strip()
                if before and self._now() == self._on:  # what somebody else has set since stays
                    self._switch.write_text(before)
                os.ftruncate(self._file, 0)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing would not do where a child that is just being started has it too
            os.close(self._file)
            self._file = -1

    def _now(self) -> str:
        return _setting(self._switch)

    @contextlib.contextmanager
    def _tried(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._works = passes(error)
            logger.warning("%s cannot be set, so memory is made of small pages, which is slower: %s", self._switch, error)


def setting_of(switch: Path) -> str:
    """What a switch is set to; empty: the kernel has none."""
    try:
        return _setting(switch)
    except FileNotFoundError:
        return ""


def _setting(switch: Path) -> str:
    """The kernel lists all settings and puts brackets around the one that counts."""
    text = switch.read_text()
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else text.strip()
