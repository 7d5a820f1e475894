"""Snapshots on disk: published whole or not at all, found by name, refused when a byte is another. What goes is in test_store_sweeps.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.snapshots.catalog import Catalog, Corrupt, NotFound, Snapshot
from restore_agent.snapshots.chunks import ChunkStore, Lease
from restore_agent.snapshots.keyring import NoSigningKey, Signature, Untrusted, UnusableKey
from restore_agent.snapshots.manifest import Manifest
from restore_agent.snapshots.store import NameTaken, Store, StoreBusy
from tests.worlds.exhausted import descriptors_left
from tests.worlds.snapshots import CONTENT, OTHER, chunks, draft, publish


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_what_is_published_is_found_by_its_name_and_is_whole(store: Store, state: Path) -> None:
    snapshot = publish(store, CONTENT)
    assert store.get("default", "small") == snapshot
    assert str(snapshot) == f"default/small@{snapshot.digest[:12]}"
    beside = Catalog(state)  # of somebody who only looks, while the agent has the store
    assert beside.get("default", "small") == snapshot
    assert beside.list() == [snapshot]
    beside.verify(snapshot)
    assert list((state / "tmp").iterdir()) == []


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


def test_a_node_that_only_restores_publishes_nothing(store: Store, tmp_path: Path) -> None:
    publish(store, CONTENT)
    keys = tmp_path / "public"
    (keys / "trusted").mkdir(parents=True)
    key = store.keyring.signing
    (keys / "trusted" / "fleet.pem").write_bytes((store.state / "keys" / "trusted" / f"{key}.pem").read_bytes())
    store.close()
    restores = Store(store.state, keys)
    restores.verify(restores.get("default", "small"))
    with pytest.raises(NoSigningKey, match="only restores"):
        publish(restores, OTHER, "other")
    assert [found.manifest.name for found in restores.list() if isinstance(found, Snapshot)] == ["small"]
    restores.close()


def test_a_folder_of_keys_that_was_named_and_has_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnusableKey, match=f"{tmp_path / 'none'} holds no key"):
        Store(tmp_path / "state", tmp_path / "none")
    Store(tmp_path / "state").close()


def test_one_that_cannot_be_opened_is_nobody_s(tmp_path: Path) -> None:
    """As for want of a descriptor: what opens it is told why, and the next try is not told that this very process has it."""
    Store(tmp_path).close()
    for left in range(12):
        with descriptors_left(left), contextlib.suppress(OSError):
            Store(tmp_path).close()
    Store(tmp_path).close()


def copied(snapshot: Snapshot, store: Store, lease: Lease) -> tuple[Path, bytes, Signature]:
    """As from another node: its small files in a workspace, its chunks in the store, its manifest and its signature in hand."""
    workspace = store.workspace()
    for name in snapshot.manifest.files:
        (workspace / name).parent.mkdir(exist_ok=True)
        (workspace / name).write_bytes((snapshot.directory / name).read_bytes())
    there = ChunkStore(snapshot.directory.parent.parent / "chunks")
    for chunk in snapshot.chunks:
        lease.put(there.path(chunk.hash).read_bytes())
    signature = Signature.decode((snapshot.directory / "signature.json").read_bytes())
    return workspace, (snapshot.directory / "manifest.json").read_bytes(), signature


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[tuple[Snapshot, bytes]]:
    """A snapshot of another node, and the public key that it was signed by."""
    other = Store(tmp_path / "other")
    snapshot = publish(other, CONTENT)
    yield snapshot, (other.state / "keys" / "trusted" / f"{other.keyring.signing}.pem").read_bytes()
    other.close()


def test_what_comes_from_another_node_is_adopted_with_its_signature(store: Store, foreign: tuple[Snapshot, bytes]) -> None:
    snapshot, pem = foreign
    with store.chunks.lease() as lease:
        with pytest.raises(Untrusted, match="not trusted here"):
            store.adopt(*copied(snapshot, store, lease), lease, replace=False)
        assert store.list() == []
        key = store.keyring.trust(pem)
        adopted = store.adopt(*copied(snapshot, store, lease), lease, replace=False)
    assert (adopted.digest, adopted.manifest) == (snapshot.digest, snapshot.manifest)
    store.verify(store.get("default", "small"))
    assert store.signature(adopted).key == key


def test_what_comes_once_more_mends_what_is_there(store: Store, foreign: tuple[Snapshot, bytes], state: Path) -> None:
    snapshot, pem = foreign
    store.keyring.trust(pem)
    with store.chunks.lease() as lease:
        adopted = store.adopt(*copied(snapshot, store, lease), lease, replace=False)
    (adopted.directory / "pages.index").write_bytes(b"?")
    with store.chunks.lease() as lease:
        with pytest.raises(NameTaken):
            store.adopt(*copied(snapshot, store, lease), lease, replace=False)
        store.adopt(*copied(snapshot, store, lease), lease, replace=True)
    store.verify(store.get("default", "small"))
    assert [folder.name for folder in (state / "snapshots").iterdir()] == [snapshot.digest]


def test_one_agent_at_a_time(store: Store, state: Path) -> None:
    with pytest.raises(StoreBusy, match="in use"):
        Store(state)
    store.close()
    Store(state).close()


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


def test_a_name_stands_when_all_of_it_is_on_the_disk(store: Store, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine that loses its power would find it."""
    synced: set[int] = set()
    before: list[set[int]] = []
    fsync, replace = os.fsync, os.replace

    def syncs(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        fsync(fd)

    def replaces(old: Path, new: Path) -> None:
        if Path(new) == state / "names/default/small":
            before.append(set(synced))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(os, "replace", replaces)
    snapshot = publish(store, CONTENT)
    files = [path for path in snapshot.directory.rglob("*") if path.is_file()]
    pages = [store.chunks.path(chunk.hash) for chunk in snapshot.chunks]
    folders = [snapshot.directory.parent, *(path.parent for path in [*files, *pages]), state / "chunks", state / "names"]
    assert {path.stat().st_ino for path in [*files, *pages, *folders]} <= before[0]
    names, gone = state / "names/default", []
    inode = names.stat().st_ino
    synced.clear()
    monkeypatch.setattr(store.chunks, "collect", lambda *used: gone.append(inode in synced) or True)
    store.remove("default", "small")
    assert gone == [True], "nothing goes before its name has"


def test_the_state_folder_and_its_pair_of_keys_are_the_agent_s_alone(store: Store, state: Path) -> None:
    key = store.keyring.signing
    assert (state / "keys" / "signing.pem").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o077 == 0
    store.close()
    again = Store(state)
    assert again.keyring.signing == key
    again.close()


def test_a_snapshot_that_comes_or_goes_has_no_other_one_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    there = publish(store, CONTENT, "there")
    decode, read = Manifest.decode, list[str]()
    monkeypatch.setattr(Manifest, "decode", lambda data: [read.append(decode(data).name), decode(data)][1])
    publish(store, OTHER, "new")
    store.remove("default", "new")
    store.sweep()
    assert read == ["new"]
    store.sign("default", "there")
    os.utime(there.directory / "manifest.json")
    del read[:]
    store.sweep()
    store.sweep()
    assert read == ["there"], "its file was written to, maybe: then it is read once more"
