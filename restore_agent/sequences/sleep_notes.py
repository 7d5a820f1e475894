"""What an agent writes down of engines that sleep in their pods: the next one has to find them, and to know how each is woken.

A note is written before an engine is moved and again when it stands, so that a note of one that was on its way is what an agent leaves that
was killed then: nobody knows how far it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from restore_agent.sequences.standby import Rung, Standby


@dataclass(frozen=True, slots=True)
class Note:
    """Of one replica. pid: on this host, of its container's first process. rung: on which it sleeps; empty: it was on its way. The others
    are a Standby's."""

    pid: int
    rung: str = ""
    gpu_pids: tuple[int, ...] = ()
    gpus: Mapping[str, int] | None = None
    before: tuple[str, ...] = ()
    processes: tuple[int, ...] = ()
    places: Mapping[str, str] | None = None

    @property
    def stands(self) -> Rung | None:
        """None: it was on its way."""
        return Rung(self.rung) if self.rung else None


class SleepNotes:
    """A folder with a file for each replica. Blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prune(self) -> None:
        """Forgets those whose container has ended while there was no agent. Raises OSError."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for path in self._folder.iterdir():
            note = self.read(path.name)
            if note is None or not Path(f"/proc/{note.pid}").exists():
                path.unlink(missing_ok=True)

    def read(self, replica_id: str) -> Note | None:
        """None: there is none, or none that can be read."""
        try:
            found: dict[str, Any] = json.loads((self._folder / replica_id).read_text())
            note = Note(**{**found, **{name: tuple(found[name]) for name in ("gpu_pids", "before", "processes")}})
            return note if note.stands or not note.rung else None
        except (OSError, ValueError, TypeError, LookupError):
            return None

    def moves(self, replica_id: str, pid: int) -> None:
        """Raises OSError."""
        self._write(replica_id, Note(pid))

    def stands(self, replica_id: str, pid: int, standby: Standby) -> None:
        """Raises OSError."""
        of_gpus = (tuple(standby.gpu_pids), dict(standby.gpus), tuple(standby.before))
        self._write(replica_id, Note(pid, standby.rung.value, *of_gpus, tuple(standby.processes), dict(standby.places)))

    def forget(self, replica_id: str) -> None:
        (self._folder / replica_id).unlink(missing_ok=True)

    def _write(self, replica_id: str, note: Note) -> None:
        fresh = self._folder / f".{replica_id}"
        fresh.write_text(json.dumps(asdict(note)))
        fresh.rename(self._folder / replica_id)
