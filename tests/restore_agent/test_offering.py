"""What a node offers of what lies on its disk and stands in its memory."""

from pathlib import Path

import pytest
from blake3 import blake3

from restore_agent.drivers.headroom import Headroom
from restore_agent.sequences.offering import Offering
from restore_agent.sequences.staging import Staging
from restore_agent.snapshots.catalog import MANIFEST, Snapshot
from restore_agent.snapshots.keyring import SIGNATURE
from restore_agent.snapshots.store import Store
from restore_agent.transfer.contents import in_files
from restore_agent.transfer.layout import chunk_key, manifest_key, signature_key
from restore_agent.transfer.offers import InFile, Offered
from restore_agent.transfer.source import Denied
from tests.worlds.snapshots import CRIU, publish
from tests.worlds.travelling import WEIGHTS, take

CONTENT = bytes(range(256)) * 4096 * 5


@pytest.fixture
def snapshot(store: Store) -> Snapshot:
    return publish(store, CONTENT)


def in_no_memory(digest: str, chunk_hash: str) -> None:
    """Nothing is staged."""


def content(offered: Offered, key: str) -> bytes:
    found = offered.get(key, 0)
    if isinstance(found, InFile):
        return found.path.read_bytes()[found.offset : found.offset + found.size]
    return bytes(found)


def test_all_of_a_snapshot_by_what_is_in_it(store: Store, snapshot: Snapshot) -> None:
    offered = Offering(store, in_no_memory)(snapshot.digest)
    assert offered
    assert offered.namespace == "default"
    assert content(offered, manifest_key(snapshot.digest)) == (snapshot.directory / MANIFEST).read_bytes()
    assert content(offered, signature_key(snapshot.digest)) == (snapshot.directory / SIGNATURE).read_bytes()
    for hashed in [*(chunk.hash for chunk in snapshot.chunks), *(record.hash for record in snapshot.manifest.files.values())]:
        assert blake3(content(offered, chunk_key(hashed))).hexdigest() == hashed


async def test_of_an_image_in_memory_the_chunks_are_given_from_there(tmp_path: Path, store: Store, snapshot: Snapshot) -> None:
    staging = Staging(store, tmp_path / "memory", CRIU, None, Headroom(), lambda _: None)
    offering = Offering(store, staging.chunk)
    try:
        await staging.stage(snapshot)
        offered = offering(snapshot.digest)
        assert offered
        found = [offered.get(chunk_key(chunk.hash), 0) for chunk in snapshot.chunks]
        assert all(isinstance(each, memoryview) for each in found)
        assert b"".join(bytes(each) for each in found if isinstance(each, memoryview)) == CONTENT
        staging.unstage(snapshot.digest)
        assert bytes(found[0]) == CONTENT[: len(found[0])], "what is being sent stays"  # type: ignore[arg-type]
        assert isinstance(offered.get(chunk_key(snapshot.chunks[0].hash), 0), InFile)
    finally:
        await staging.close()


def test_what_is_not_trusted_any_more_is_not_offered(store: Store, snapshot: Snapshot) -> None:
    offering = Offering(store, in_no_memory)
    assert offering(snapshot.digest)
    store.keyring.revoke(store.keyring.signing)
    assert offering(snapshot.digest) is None


def test_what_was_removed_is_not_offered(store: Store, snapshot: Snapshot) -> None:
    offering = Offering(store, in_no_memory)
    assert offering(snapshot.digest)
    store.remove("default", "small")
    assert offering(snapshot.digest) is None


@pytest.mark.parametrize("digest", ["", "..", ".", "0" * 64, "names"])
def test_what_is_no_snapshot_here_is_none(store: Store, snapshot: Snapshot, digest: str) -> None:
    assert Offering(store, in_no_memory)(digest) is None


def test_another_snapshots_chunk_is_not_given(store: Store, snapshot: Snapshot) -> None:
    other = publish(store, b"\1" * 4096, "other")
    offered = Offering(store, in_no_memory)(snapshot.digest)
    assert offered
    with pytest.raises(Denied):
        offered.get(chunk_key(other.chunks[0].hash), 0)


def test_a_snapshot_that_was_edited_is_not_offered(store: Store, snapshot: Snapshot) -> None:
    offering = Offering(store, in_no_memory)
    path = snapshot.directory / MANIFEST
    path.write_bytes(snapshot.manifest.encode() + b" ")
    assert offering(snapshot.digest) is None


def test_weights_are_given_from_the_models_own_files(tmp_path: Path, store: Store) -> None:
    taken = take(store, tmp_path / "model")
    offered = Offering(store, in_no_memory)(taken.digest)
    assert offered
    [region] = store.regions(taken)
    got = b"".join(content(offered, chunk_key(part.chunk.hash)) for part in in_files(region.record, region.layout))
    assert got == WEIGHTS
