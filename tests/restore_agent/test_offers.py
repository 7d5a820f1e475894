"""What a node gives to others, and to whom."""

import threading
from pathlib import Path

import pytest

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.layout import chunk_key, manifest_key, name_key, signature_key
from restore_agent.transfer.offers import InFile, Offered, Offers
from restore_agent.transfer.source import Absent, Denied, Unreachable
from tests.worlds.peers import DIGEST, MANIFEST, NAMESPACE, SIGNATURE, make_chunks, offered
from tests.worlds.waiting import PATIENCE

OTHERS = "0dd5" * 16  # a snapshot of another namespace


def test_manifest_signature_and_each_chunk_are_given(tmp_path: Path) -> None:
    chunks = make_chunks(tmp_path)
    one = offered(tmp_path, chunks)
    assert one.get(manifest_key(DIGEST), 0) == MANIFEST
    assert one.get(signature_key(DIGEST), 0) == SIGNATURE
    assert [one.get(chunk_key(chunk.hash), 0) for chunk in chunks] == [InFile(tmp_path / chunk.hash, 0, chunk.size) for chunk in chunks]


def test_a_chunk_that_stands_in_memory_is_given_from_there() -> None:
    memory = memoryview(b"pages")
    chunk = Chunk("ab" * 32, 5)
    one = Offered(NAMESPACE, DIGEST, MANIFEST, SIGNATURE, [chunk], lambda _: memory)
    assert one.get(chunk_key(chunk.hash), 0) is memory


def test_a_namespace_gets_another_ones_chunk_neither_by_its_hash_nor_by_the_snapshot(tmp_path: Path) -> None:
    mine, theirs = make_chunks(tmp_path / "mine", 1), make_chunks(tmp_path / "theirs", 1)
    snapshots = {
        DIGEST: offered(tmp_path / "mine", mine),
        OTHERS: offered(tmp_path / "theirs", theirs, "others", OTHERS),
    }
    offers = Offers(snapshots.get)
    with pytest.raises(Denied, match=f"snapshot {DIGEST[:12]} of namespace {NAMESPACE} has no chunks/"):
        offers.get(NAMESPACE, DIGEST).get(chunk_key(theirs[0].hash), 0)
    with pytest.raises(Denied, match=f"not of namespace {NAMESPACE}"):
        offers.get(NAMESPACE, OTHERS)
    assert offers.get("others", OTHERS).get(chunk_key(theirs[0].hash), 0)


@pytest.mark.parametrize("key", [manifest_key(OTHERS), name_key(NAMESPACE, "chat"), "", "../key", "chunks/"])
def test_what_is_no_part_of_the_snapshot_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(Denied):
        offered(tmp_path, make_chunks(tmp_path)).get(key, 0)


def test_a_snapshot_that_is_not_here_is_absent() -> None:
    with pytest.raises(Absent, match="this node has no snapshot 5eed"):
        Offers(lambda _: None).get(NAMESPACE, DIGEST)


def test_a_chunk_on_its_way_is_given_to_who_waits_in_the_moment_it_arrives(tmp_path: Path) -> None:
    [chunk] = make_chunks(tmp_path / "elsewhere", 1)
    one = offered(tmp_path, [chunk])
    offers = Offers(lambda _: None)
    got: list[object] = []
    with offers.on_its_way(one):
        with pytest.raises(Absent, match="has not come to this node yet"):
            offers.get(NAMESPACE, DIGEST).get(chunk_key(chunk.hash), 0)
        with pytest.raises(Unreachable, match="has not come to this node yet"):
            offers.get(NAMESPACE, DIGEST).get(chunk_key(chunk.hash), 0.01)
        waiting = threading.Thread(target=lambda: got.append(offers.get(NAMESPACE, DIGEST).get(chunk_key(chunk.hash), PATIENCE)))
        waiting.start()
        one.arrived(chunk, tmp_path / "weights", 4096)
        waiting.join(PATIENCE / 2)
        assert got == [InFile(tmp_path / "weights", 4096, chunk.size)]
    with pytest.raises(Absent):
        offers.get(NAMESPACE, DIGEST)


def test_until_all_chunks_are_named_one_that_is_not_may_come(tmp_path: Path) -> None:
    [named, later, never] = make_chunks(tmp_path, 3)
    one = Offered(NAMESPACE, DIGEST, MANIFEST, SIGNATURE, [named], all_named=False)
    with pytest.raises(Absent, match="has not come to this node yet"):
        one.get(chunk_key(later.hash), 0)
    got: list[object] = []
    waiting = threading.Thread(target=lambda: got.append(one.get(chunk_key(later.hash), PATIENCE)))
    waiting.start()
    one.name([later])
    one.arrived(later, tmp_path / "model", 7)
    waiting.join(PATIENCE / 2)
    assert got == [InFile(tmp_path / "model", 7, later.size)]
    with pytest.raises(Denied):
        one.get(chunk_key(never.hash), PATIENCE)
