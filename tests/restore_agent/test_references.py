"""Which snapshots need what: counted as they come and go, and read again only where somebody wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from restore_agent.snapshots.catalog import Corrupt
from restore_agent.snapshots.manifest import Manifest
from restore_agent.snapshots.references import References
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish

MIB = 1 << 20


class World:
    """Three snapshots: of the chunks 1 and 2, of 2, of 2 and 3. Each chunk has 4 MiB."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.read: list[str] = []
        one, two, three = (bytes([number]) * (4 * MIB) for number in (1, 2, 3))
        self.a, self.b, self.c = (publish(store, content, name) for name, content in (("a", one + two), ("b", two), ("c", two + three)))
        self.references = References(store.state, self._manifest)

    def _manifest(self, digest: str) -> Manifest:
        self.read.append(digest)
        return self.store.of_digest(digest).manifest

    def file(self, digest: str) -> Path:
        return self.store.state / "snapshots" / digest / "manifest.json"


@pytest.fixture
def world(store: Store) -> World:
    return World(store)


def test_users_are_counted_as_snapshots_come_and_go(world: World) -> None:
    a, b, c = world.a.digest, world.b.digest, world.c.digest
    first, common = (chunk.hash for chunk in world.a.chunks)
    (_, last) = (chunk.hash for chunk in world.c.chunks)
    world.references.look([a, b])
    assert world.references.chunks == {first: 1, common: 2}
    world.references.look([a, b, c])
    assert world.references.chunks == {first: 1, common: 3, last: 1}
    alone, shared = world.references.chunk_bytes(())
    assert alone == {a: 4 * MIB, b: 0, c: 4 * MIB}
    assert shared == {frozenset({a, b, c}): 4 * MIB}
    assert world.references.chunk_bytes({first, common}) == ({a: 0, b: 0, c: 4 * MIB}, {})
    world.references.look([c])
    assert dict(world.references.chunks) == {common: 1, last: 1}
    assert world.read == [a, b, c], "each once"
    world.references.look([])
    assert not world.references.chunks


def test_one_is_read_again_where_its_file_was_written_to_and_one_that_cannot_be_read_is_told(world: World) -> None:
    a, b = world.a.digest, world.b.digest
    world.references.look([a, b])
    os.utime(world.file(a))
    world.references.look([a, b])
    assert world.read == [a, b, a]
    content = world.file(a).read_bytes()
    for wrong in (b"{}", None):
        world.file(a).write_bytes(wrong) if wrong else world.file(a).unlink()
        with pytest.raises(Corrupt):
            world.references.look([a, b])
    world.file(a).write_bytes(content)
    world.references.look([a, b])
    assert world.references.chunks == {world.a.chunks[0].hash: 1, world.a.chunks[1].hash: 2}, "none is counted twice"
