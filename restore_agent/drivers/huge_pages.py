"""Transparent huge pages, on for the moment of a restore: the fill then faults 2 MiB at a time (a third to a half of its time saved).

The switch is the whole machine's, so it is put back to what it was: after the last of several restores at once, and, where the agent was
killed in between, at its next start, from a note in the state folder. Rejected: MADV_HUGEPAGE written into the image's mappings, which
needs no switch, but the restored process would keep it and grow by it.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LOG = logging.getLogger("zerowake.agent")


class HugePages:
    def __init__(self, state: Path, switch: Path = _SWITCH) -> None:
        self._switch = switch
        self._note = state / "hugepages-before"
        self._users = 0
        self._works = switch.exists()
        if self._note.exists():
            self._set(self._note.read_text())
            self._note.unlink()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Holds the switch at `always`. Where the kernel has none, or refuses, restores only go slower."""
        self._users += 1
        if self._users == 1 and self._works:
            found = re.search(r"\[(\w+)\]", self._switch.read_text())
            before = found[1] if found else "madvise"
            if before != "always":
                self._note.write_text(before)
                self._set("always")
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0 and self._note.exists():
                self._set(self._note.read_text())
                self._note.unlink()

    def _set(self, value: str) -> None:
        try:
            self._switch.write_text(value)
        except OSError as error:
            self._works = False
            _LOG.warning("cannot write %s to %s: %s; restores use small pages and are slower", value, self._switch, error)
