"""The stream of everything that changes on a node, for whoever listens."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator

from restore_agent.sequences.replicas import Replica
from restore_agent.snapshots.catalog import Snapshot, Unreadable


class Removed:
    """A snapshot that is no longer on this node, or a name behind which none could be used."""

    def __init__(self, snapshot: Snapshot | Unreadable) -> None:
        self.snapshot = snapshot


Change = Snapshot | Removed | Replica | Unreadable


class Changes:
    """Use `with changes.heard() as queue`."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Change]] = set()
        self._revisions = itertools.count(1)

    @contextlib.contextmanager
    def heard(self) -> Iterator[asyncio.Queue[Change]]:
        """A queue that hears of every change from now on."""
        queue: asyncio.Queue[Change] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    def revision(self) -> int:
        """The next one. Of two words about the same thing, in whichever order they are heard, the one with the higher was said later."""
        return next(self._revisions)

    def tell(self, change: Change) -> None:
        """Everybody who listens."""
        for queue in self._listeners:
            queue.put_nowait(change)
