"""One image in this node's memory, or on its way there."""

from __future__ import annotations

import asyncio
from pathlib import Path

from restore_agent.pages.fill import Arena
from restore_agent.sequences.staging_order import Turn
from restore_agent.snapshots.catalog import Snapshot


class Staged:
    """Await `skeleton`, then `arriving` to fill from it meanwhile, or `arena`."""

    def __init__(self, snapshot: Snapshot, directory: Path) -> None:
        """`directory`: its own, which comes into being."""
        self.snapshot = snapshot
        self.directory = directory
        loop = asyncio.get_running_loop()
        self.skeleton: asyncio.Future[Path] = loop.create_future()  # CRIU's images directory
        self.arriving: asyncio.Future[Arena] = loop.create_future()  # while chunks still come: a fill takes each, and fails as they do
        self.arena: asyncio.Future[Arena] = loop.create_future()  # with every page
        self.ready = asyncio.Event()  # set once arena and headroom are complete
        self.turn = Turn()
        self.task: asyncio.Task[None] | None = None  # brings it
        self.users = 0
        self.dropped = False
        self.for_request = False  # a request that no replica was made for yet had to wait for it
        self.seconds = 0.0  # that it was read for; 0.0: others were read before it, or it is not there yet
        self.given = float("-inf")  # when a piece of it was given to another agent last

    @property
    def size(self) -> int:
        """Bytes of its pages."""
        return self.snapshot.manifest.page_bytes

    @property
    def bytes_to_come(self) -> int:
        arena = self.arriving.result() if self.arriving.done() and not self.arriving.exception() else None
        return self.size - (arena.arrived_bytes if arena else 0)

    @property
    def is_coming(self) -> bool:
        return not self.arena.done()

    def fail(self, error: Exception) -> None:
        """Whoever waits for what has not come gets this error."""
        for future in (self.skeleton, self.arriving, self.arena):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting
