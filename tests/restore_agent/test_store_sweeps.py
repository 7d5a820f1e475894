"""What of a store goes, and what stays: what a crash or a removal left, what others share, and what is read."""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restore_agent.snapshots.catalog import Catalog, NotFound, Snapshot
from restore_agent.snapshots.chunks import Lease
from restore_agent.snapshots.manifest import ChunkRecord
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import CONTENT, OTHER, chunks, draft, publish
from tests.worlds.travelling import take


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


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
