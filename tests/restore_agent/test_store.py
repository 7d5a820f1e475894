"""Snapshots on disk: published whole or not at all, found by name, refused when a byte is another, and removed with what only they had."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restore_agent.snapshots.catalog import Catalog, Corrupt, NotFound, Snapshot
from restore_agent.snapshots.chunks import ChunkStore, Lease
from restore_agent.snapshots.keyring import NoSigningKey, Signature, Untrusted, UnusableKey
from restore_agent.snapshots.manifest import ChunkRecord, Manifest
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import NameTaken, Store, StoreBusy
from tests.worlds.exhausted import descriptors_left
from tests.worlds.snapshots import draft, publish
from tests.worlds.travelling import take

CONTENT = random.Random(5).randbytes(64 * PAGE)
OTHER = random.Random(6).randbytes(64 * PAGE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


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
    (spoiled.directory / "manifest.json").write_text("{}")
    store.remove("default", "other")
    assert {chunk.hash for chunk in [*spoiled.chunks, *other.chunks]} == chunks(state)
    assert spoiled.directory.exists(), "it stays for a look at it"
    assert store.postponed


def test_what_a_corrupt_manifest_kept_goes_once_it_is_whole_again(store: Store, state: Path) -> None:
    spoiled, other = publish(store, CONTENT, "spoiled"), publish(store, OTHER, "other")
    manifest = spoiled.directory / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_text("{}")
    store.remove("default", "other")
    manifest.write_bytes(content)
    assert store.postponed, "whoever reads a snapshot next has it swept"
    store.sweep()
    assert {chunk.hash for chunk in spoiled.chunks} == chunks(state)
    assert not other.directory.exists() and not store.postponed


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


def test_weights_that_came_from_elsewhere_stay_while_they_are_read(store: Store, state: Path, tmp_path: Path) -> None:
    snapshot = take(store, tmp_path / "model")
    fetched = store.fetched_weights(snapshot.manifest.weights[0])
    fetched.mkdir(parents=True)
    (fetched / "model.safetensors").write_bytes(b"weights")
    with store.hold(snapshot):
        store.remove("default", "small")
        assert (fetched / "model.safetensors").read_bytes() == b"weights"
        assert store.postponed
    store.sweep()
    assert not fetched.exists() and not store.postponed


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


def test_what_nobody_trusts_any_more_loses_nothing_by_a_sweep_and_keeps_no_others_bytes(store: Store, state: Path) -> None:
    distrusted, other = publish(store, CONTENT, "distrusted"), publish(store, OTHER, "other")
    (distrusted.directory / "signature.json").unlink()
    store.remove("default", "other")
    assert chunks(state) == {chunk.hash for chunk in distrusted.chunks} != {chunk.hash for chunk in other.chunks}
    store.verify(store.sign("default", "distrusted"))


def test_the_state_folder_and_its_pair_of_keys_are_the_agent_s_alone(store: Store, state: Path) -> None:
    key = store.keyring.signing
    assert (state / "keys" / "signing.pem").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o077 == 0
    store.close()
    again = Store(state)
    assert again.keyring.signing == key
    again.close()


def test_what_the_end_of_one_alone_would_free_is_its_own_and_what_two_share_goes_with_both(store: Store) -> None:
    common, own = random.Random(1).randbytes(4 << 20), random.Random(2).randbytes(4 << 20)
    one = publish(store, common + own, "one")
    other = publish(store, common, "other")
    alone, shared = store.removable_bytes()
    assert 4 << 20 <= alone[one.digest] < 5 << 20
    assert alone[other.digest] < 1 << 20
    assert shared == {frozenset({one.digest, other.digest}): 4 << 20}
    with store.hold(one):
        alone, shared = store.removable_bytes()
        assert (alone[one.digest] < 1 << 20, shared) == (True, {}), "who reads it keeps it"
    store.remove("default", "one")
    assert store.removable_bytes()[0][other.digest] >= 4 << 20
    (other.directory / "manifest.json").write_bytes(b"{}")
    assert store.removable_bytes() == ({}, {}), "nothing is swept then"


def test_weights_that_two_snapshots_share_go_with_both(store: Store, tmp_path: Path) -> None:
    one, other = take(store, tmp_path / "model", name="one"), take(store, tmp_path / "model", name="other")
    fetched = store.fetched_weights(one.manifest.weights[0])
    fetched.mkdir(parents=True)
    (fetched / "model.safetensors").write_bytes(b"weights" * 4096)
    both = frozenset({one.digest, other.digest})
    before = store.removable_bytes()[1][both]
    assert before >= 7 * 4096
    store.remove("default", "other")
    assert store.removable_bytes()[0][one.digest] > before


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


_NAMES, _PARTS = st.sampled_from("abc"), st.lists(st.sampled_from(["1", "2", "3", "4"]), max_size=3, unique=True)
_STEPS = st.lists(
    st.tuples(st.just("publish"), _NAMES, _PARTS)
    | st.tuples(st.sampled_from(["remove", "hold", "damage"]), _NAMES, st.just([]))
    | st.tuples(st.sampled_from(["let go", "restart"]), st.just(""), st.just([])),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(_STEPS)
def test_whatever_comes_and_goes_what_is_named_is_whole_and_nothing_else_stays(steps: list[tuple[str, str, list[str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store, state = Store(Path(folder) / "state"), Path(folder) / "state"
        held, named, damaged = contextlib.ExitStack(), dict[str, Snapshot](), set[str]()
        reads: list[Snapshot] = []
        for what, name, parts in steps:
            if what == "publish":
                workspace = store.workspace()
                with store.chunks.lease() as lease:
                    put = [lease.put(part.encode() * 100) for part in parts]
                    records = tuple(ChunkRecord(hash=chunk.hash, size=chunk.size) for chunk in put)
                    named[name] = store.publish(workspace, draft(lease, workspace, b"", name, chunks=records), lease, replace=True)
                damaged.discard(named[name].digest)
            elif what == "remove" and name in named:
                store.remove("default", name)
                damaged.discard(named.pop(name).digest)
            elif what == "hold" and name in named:
                held.enter_context(store.hold(named[name]))
                reads.append(named[name])
            elif what == "damage" and name in named:
                (named[name].directory / "manifest.json").write_bytes(b"{}")
                damaged.add(named[name].digest)
            elif what in ("let go", "restart"):
                held.close()
                reads.clear()
                if what == "restart":
                    store.close()
                    store = Store(state)
            store.sweep()
            needed = {chunk.hash for snapshot in (*named.values(), *reads) for chunk in snapshot.chunks}
            assert needed <= chunks(state)
            if not damaged:
                assert needed == chunks(state)
                for snapshot in named.values():
                    store.verify(snapshot)
        held.close()
        stack.callback(store.close)
