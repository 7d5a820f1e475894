"""The agent's side of the control directory: words said, taken back and heard, and the doors that engines wait at (control_directory.py).

A door is a FIFO. It is open while a descriptor of ours writes to it, which nobody ever does: opening it is what lets the engine go. It is
opened after its word was written and closed before the word is taken back, so an engine that finds it open finds the word. It is closed,
too, when the engine has ended, or nobody knows the engine any more. An agent that ends shuts all of its doors, perhaps before the engine
came through: whoever takes the engine over opens them again (`reopen`). In a pod the directory is the tenant's as well: nothing that lies
there is followed or waited for, and where a door cannot be made or opened the engine polls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Iterator
from typing import Any

from restore_agent.places.place import Place
from restore_agent.places.processes import status
from restore_agent.workload.control_directory import ANSWER_DOOR, DOORS, READY, RENEWAL_REQUESTED

_OPEN = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # to read as well: without that it needs somebody who reads
_TRIED = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # ENXIO: nobody is there to read


class Control:
    """The control directory of one engine, as the agent uses it."""

    def __init__(self, place: Place, pid: int) -> None:
        """`pid`: of the engine's root process in the place."""
        self._place = place
        self._pid = pid
        self._open: dict[str, weakref.finalize[..., Any]] = {}  # doors, by name, and what closes them
        self._is_watched = False  # the engine's end closes them

    @staticmethod
    def make_doors(place: Place) -> None:
        """Before an engine runs there. Raises PlaceError."""
        with contextlib.suppress(OSError):  # in a pod it is so already
            place.control_directory.chmod(0o1777)  # processes of an engine that have given up root say what they renew
        for name in set(DOORS.values()):
            with contextlib.suppress(OSError):  # it is there, or there is no room for it
                os.mkfifo(place.control_directory / name, 0o644)  # an engine in a pod may be another user

    @property
    def is_ready(self) -> bool:
        """Whether the engine has said `ready-for-snapshot`."""
        return (self._place.control_directory / READY).exists()

    def say(self, word: str, content: str = "") -> None:
        """Writes one of the agent's words, with a content that is for the engine's own user alone, and opens its door. Raises OSError."""
        self.write(word, content, is_private=bool(content))
        self._open_door(DOORS[word])

    @contextlib.contextmanager
    def renewing(self, content: str) -> Iterator[None]:
        """Says `renewal-requested`, for the engine's own user alone. Within the block its door is open: whoever stands there looks what was
        said, and stands there again. Raises OSError."""
        self.write(RENEWAL_REQUESTED, content, is_private=True)
        self._open_door(ANSWER_DOOR)
        try:
            yield
        finally:
            self._close(ANSWER_DOOR)

    def is_awaited(self, word: str) -> bool:
        """Whether an engine stands at the word's door; it looks for the word then, and stands there again. True, too, without a door."""
        try:
            os.close(os.open(self._place.control_directory / DOORS[word], _TRIED))
        except OSError as error:
            return error.errno != errno.ENXIO
        return True

    def reopen(self) -> None:
        """Opens the doors of the words that stand, whoever said them."""
        for word, door in DOORS.items():
            if (self._place.control_directory / word).exists():
                self._open_door(door)

    def take_back(self, *words: str) -> None:
        """Removes words, the engine's own among them, and shuts their doors. Raises OSError."""
        for word in words:
            if word in DOORS:
                self._close(DOORS[word])
            (self._place.control_directory / word).unlink(missing_ok=True)

    def said_at(self, word: str) -> float | None:
        """When a word that stands was said, by the wall clock."""
        try:
            return (self._place.control_directory / word).stat().st_mtime
        except OSError:
            return None

    def write(self, name: str, content: str, is_private: bool = False) -> None:
        """A file that appears whole. Raises OSError."""
        fresh = self._place.control_directory / f".{name}"
        fresh.unlink(missing_ok=True)
        mode = 0o600 if is_private else 0o666
        # Made here: no pipe and no link that another has put there.
        with open(fresh, "x", opener=lambda path, flags: os.open(path, flags, mode)) as file:
            if is_private:
                with contextlib.suppress(OSError, LookupError):  # it has ended, or is root
                    if (host := self._place.host_pid(self._pid)) is not None:
                        os.fchown(file.fileno(), int(status(host)["Uid"].split()[1]), -1)
            file.write(content)
        fresh.rename(fresh.with_name(name))

    def _open_door(self, door: str) -> None:
        if door not in self._open:
            with contextlib.suppress(OSError):
                self._open[door] = weakref.finalize(self, os.close, os.open(self._place.control_directory / door, _OPEN))
        if self._open and not self._is_watched:
            self._is_watched = True
            self._place.exit_of(self._pid).add_done_callback(lambda _: self._close(*DOORS.values()))

    def _close(self, *doors: str) -> None:
        for door in doors:
            if close := self._open.pop(door, None):
                close()
