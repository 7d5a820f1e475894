"""Snapshots on disk: published whole or not at all, found by name, refused when a byte is another, and removed with what only they had."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from restore_agent.snapshots.chunks import Lease
from restore_agent.snapshots.manifest import InvalidName
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import Catalog, Corrupt, NameTaken, NotFound, Snapshot, Store, StoreBusy, Unreadable
from tests.worlds.snapshots import draft, publish

CONTENT = random.Random(5).randbytes(64 * PAGE)
OTHER = random.Random(6).randbytes(64 * PAGE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(state: Path) -> Iterator[Store]:
    store = Store(state)
    yield store
    store.close()


def chunks(state: Path) -> set[str]:
    return {path.name for path in (state / "chunks").glob("*/*")}


def test_what_is_published_is_found_by_its_name_and_is_whole(store: Store, state: Path) -> None:
    snapshot = publish(store, CONTENT)
    assert store.get("default", "small") == snapshot
    assert str(snapshot) == f"default/small@{snapshot.digest[:12]}"
    beside = Catalog(state)  # of somebody who only looks, while the agent has the store
    assert beside.get("default", "small") == snapshot
    assert beside.list() == [snapshot]
    beside.verify(snapshot)
    assert list((state / "tmp").iterdir()) == []


def test_a_catalog_of_nothing_is_empty(state: Path) -> None:
    assert Catalog(state).list() == []
    with pytest.raises(NotFound):
        Catalog(state).get("default", "small")


def test_a_digest_that_is_asked_for_must_be_the_one(store: Store) -> None:
    snapshot = publish(store, CONTENT)
    assert store.get("default", "small", snapshot.digest) == snapshot
    with pytest.raises(NotFound, match=f"is {snapshot.digest[:12]}, not 0123"):
        store.get("default", "small", "0123")


@pytest.mark.parametrize(("namespace", "name"), [("default", "../small"), ("a/b", "small"), ("default", ""), ("default", "Small")])
def test_a_name_that_could_be_a_path_is_refused(store: Store, namespace: str, name: str) -> None:
    with pytest.raises(InvalidName):
        store.get(namespace, name)


def test_a_taken_name_is_refused_and_replacing_removes_the_old_bytes(store: Store, state: Path) -> None:
    old = publish(store, CONTENT)
    before = chunks(state)
    with pytest.raises(NameTaken, match="default/small exists"):
        publish(store, OTHER)
    assert store.get("default", "small") == old
    new = publish(store, OTHER, replace=True)
    assert store.get("default", "small") == new != old
    assert [folder.name for folder in (state / "snapshots").iterdir()] == [new.digest]
    assert chunks(state).isdisjoint(before)


def test_a_removed_snapshot_leaves_what_others_share(store: Store, state: Path) -> None:
    one, two = publish(store, CONTENT, "one"), publish(store, CONTENT, "two")
    assert {chunk.hash for chunk in one.chunks} == {chunk.hash for chunk in two.chunks} == chunks(state)
    store.remove("default", "one")
    store.verify(two)
    store.remove("default", "two")
    assert chunks(state) == set()
    assert list((state / "snapshots").iterdir()) == []
    assert list((state / "names").iterdir()) == [], "nor a folder of a namespace that has none"
    with pytest.raises(NotFound, match=r"on this node$"):
        store.remove("default", "two")


def spoil_manifest(snapshot: Snapshot) -> None:
    path = snapshot.directory / "manifest.json"
    path.write_text(path.read_text().replace('"model":"small"', '"model":"other"'))


def spoil_seal(snapshot: Snapshot) -> None:
    (snapshot.directory / "seal").write_text("0" * 64)


def remove_seal(snapshot: Snapshot) -> None:
    (snapshot.directory / "seal").unlink()


@pytest.mark.parametrize("spoil", [spoil_manifest, spoil_seal, remove_seal])
def test_a_manifest_that_is_not_the_published_one_is_refused_and_listed_with_why(store: Store, spoil: object) -> None:
    snapshot = publish(store, CONTENT)
    spoil(snapshot)  # type: ignore[operator]
    with pytest.raises(Corrupt, match=snapshot.digest[:12]):
        store.get("default", "small")
    (found,) = store.list()
    assert isinstance(found, Unreadable)
    assert (found.namespace, found.name) == ("default", "small")
    assert isinstance(found.why, Corrupt)


def test_a_manifest_of_another_store_s_key_is_refused(store: Store, tmp_path: Path) -> None:
    """Whoever can write the folder cannot make a snapshot that the agent takes for its own."""
    other = Store(tmp_path / "other")
    foreign = publish(other, CONTENT)
    other.close()
    ours = publish(store, CONTENT)
    assert foreign.digest == ours.digest
    (ours.directory / "seal").write_text((foreign.directory / "seal").read_text())
    with pytest.raises(Corrupt):
        store.get("default", "small")


def test_verifying_names_the_first_file_or_chunk_that_is_wrong(store: Store) -> None:
    snapshot = publish(store, CONTENT)
    skeleton = snapshot.directory / "images/inventory.img"
    whole = skeleton.read_bytes()
    skeleton.write_bytes(whole[:-1] + b"?")
    with pytest.raises(Corrupt, match=r"inventory\.img has changed"):
        store.verify(snapshot)
    skeleton.write_bytes(whole)
    path = store.chunks.path(snapshot.chunks[0].hash)
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(Corrupt, match=snapshot.chunks[0].hash):
        store.verify(snapshot)


def test_one_agent_at_a_time(store: Store, state: Path) -> None:
    with pytest.raises(StoreBusy, match="in use"):
        Store(state)
    store.close()
    Store(state).close()


def test_what_a_crash_left_goes_at_the_next_start(store: Store, state: Path) -> None:
    kept = publish(store, CONTENT)
    workspace = store.workspace()
    draft(Lease(store.chunks), workspace, OTHER, "half")  # of an agent that is killed now: it holds its lease
    assert len(chunks(state)) > len(kept.chunks)
    nameless = state / "snapshots" / ("0" * 64)
    nameless.mkdir()
    store.close()
    again = Store(state)
    assert not workspace.exists()
    assert not nameless.exists()
    assert chunks(state) == {chunk.hash for chunk in kept.chunks}
    again.verify(kept)
    again.close()


def test_a_corrupt_manifest_keeps_every_chunk(store: Store, state: Path) -> None:
    """It cannot be told which are its own."""
    spoiled, other = publish(store, CONTENT, "spoiled"), publish(store, OTHER, "other")
    spoil_seal(spoiled)
    store.remove("default", "other")
    assert {chunk.hash for chunk in [*spoiled.chunks, *other.chunks]} == chunks(state)
    assert spoiled.directory.exists(), "it stays for a look at it"


def test_a_draft_keeps_its_chunks_while_others_are_removed_and_published(store: Store) -> None:
    publish(store, OTHER, "other")
    workspace = store.workspace()
    with store.chunks.lease() as lease:
        made = draft(lease, workspace, CONTENT)
        store.remove("default", "other")
        publish(store, OTHER, "another")
        snapshot = store.publish(workspace, made, lease, replace=False)
    store.sweep()
    store.verify(snapshot)


@pytest.mark.parametrize("what", ["chunk", "file"])
def test_a_draft_without_all_of_its_bytes_is_not_published(store: Store, what: str) -> None:
    old = publish(store, OTHER)
    workspace = store.workspace()
    with store.chunks.lease() as lease:
        made = draft(lease, workspace, CONTENT)
        (store.chunks.path(made.chunks[0].hash) if what == "chunk" else workspace / "pages.index").unlink()
        with pytest.raises(Corrupt, match=r"is not published: .* were removed from .* while it was taken"):
            store.publish(workspace, made, lease, replace=True)
    assert store.get("default", "small") == old
    store.verify(old)


def test_a_draft_that_is_given_up_leaves_nothing_after_the_next_sweep(store: Store, state: Path) -> None:
    with store.chunks.lease() as lease:
        draft(lease, store.workspace(), CONTENT)
        store.sweep()
        assert store.postponed
    store.sweep()
    assert not store.postponed
    assert chunks(state) == set()


def test_what_is_read_stays_until_it_is_read_though_it_was_replaced_or_removed(store: Store, state: Path) -> None:
    old = publish(store, CONTENT)
    with store.hold(old):
        new = publish(store, OTHER, replace=True)
        assert store.get("default", "small") == new
        store.verify(old)
        store.remove("default", "small")
        store.verify(old)
        assert store.postponed
    store.sweep()
    assert chunks(state) == set()
    with pytest.raises(NotFound, match="removed or replaced meanwhile"):
        store.verify(old)


def test_captures_removals_and_readers_at_once_lose_nothing(store: Store, state: Path) -> None:
    """Threads publish, replace, remove and read the same names, with chunks that they share: nobody finds a snapshot that is not whole."""
    ended = threading.Event()

    def publish_and_remove(seed: int) -> None:
        dice = random.Random(seed)
        for turn in range(25):
            name = f"s{dice.randrange(3)}"
            publish(store, CONTENT[: dice.randrange(1, 5) * PAGE], name, replace=True, model=f"{seed}-{turn}")
            if dice.random() < 0.5:
                with contextlib.suppress(NotFound):
                    store.remove("default", f"s{dice.randrange(3)}")

    def look(catalog: Catalog) -> int:
        seen = 0
        while not ended.is_set():
            for found in catalog.list():
                assert isinstance(found, Snapshot), found
                with contextlib.suppress(NotFound):
                    catalog.verify(found)
                    seen += 1
        return seen

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(look, catalog) for catalog in (store, Catalog(state))]
        try:
            for writer in [pool.submit(publish_and_remove, seed) for seed in range(3)]:
                writer.result()
        finally:
            ended.set()
        assert all(reader.result() for reader in readers)
    for found in store.list():
        assert isinstance(found, Snapshot)
        store.verify(found)


def test_the_key_is_the_agent_s_alone(store: Store, state: Path) -> None:
    assert (state / "key").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o077 == 0
