"""A staging without a node around it: images of snapshots of a real store, in this process's memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from restore_agent.drivers.headroom import Headroom
from restore_agent.sequences.memory_budget import all_of_it
from restore_agent.sequences.parked_budget import Share
from restore_agent.sequences.staging import Staging
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import CRIU


class StagingWorld:
    """A staging, and what it has said."""

    def __init__(self, store: Store, memory: Path, share: Share = all_of_it) -> None:
        self.memory = memory
        self.heard: list[Snapshot] = []
        self.needed: set[str] = set()  # digests
        self.headroom = Headroom()
        self.staging = Staging(store, memory, CRIU, None, self.headroom, self.heard.append, share, self.needed.__contains__)

    async def close(self) -> None:
        await self.staging.close()
        await self.headroom.close()


@contextlib.asynccontextmanager
async def staging(store: Store, memory: Path, share: Share = all_of_it) -> AsyncIterator[StagingWorld]:
    """Afterwards nothing of it is left in `memory`, nor counted."""
    world = StagingWorld(store, memory, share)
    yield world
    await world.close()
    assert not world.memory.exists() or list(world.memory.iterdir()) == []
    assert world.staging.budget.taken_bytes == 0


@contextlib.contextmanager
def slow(store: Store, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot) -> Iterator[threading.Event]:
    """No chunk of the snapshot is read before the event is set, which the block's end does."""
    go, read_into, hashes = threading.Event(), store.chunks.read_into, {chunk.hash for chunk in snapshot.chunks}

    def read(chunk: Chunk, target: memoryview) -> None:
        if chunk.hash in hashes:
            go.wait(60)
        read_into(chunk, target)

    monkeypatch.setattr(store.chunks, "read_into", read)
    try:
        yield go
    finally:
        go.set()
