"""Snapshots that somebody or something has damaged on the disk are found, and told once; so are those that are mended."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from restore_agent.snapshots.catalog import Snapshot, Unreadable
from restore_agent.snapshots.damage import DamageWatch, Found
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish

CONTENT = random.Random(5).randbytes(64 * PAGE)


def chunk(store: Store, snapshot: Snapshot) -> Path:
    return store.chunks.path(snapshot.chunks[0].hash)


def flip(path: Path) -> None:
    """One bit, of a file whose size and time of change by its owner's word stay."""
    data = bytearray(path.read_bytes())
    before = path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES: dict[str, tuple[Callable[[Store, Snapshot], None], str]] = {
    "a chunk that was written to": (lambda store, snapshot: flip(chunk(store, snapshot)), "does not have the content that its name says"),
    "a chunk that is gone": (lambda store, snapshot: chunk(store, snapshot).unlink(), "is missing from"),
    "a chunk that is short": (lambda store, snapshot: os.truncate(chunk(store, snapshot), 1), "does not have the content"),
    "a file of the skeleton": (lambda _, snapshot: flip(snapshot.directory / "images/inventory.img"), "has changed since it was published"),
    "a file that is gone": (lambda _, snapshot: (snapshot.directory / "pages.index").unlink(), "is missing; take the snapshot again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_once_and_so_is_its_end(store: Store, tmp_path: Path, damage: str) -> None:
    snapshot, other = publish(store, CONTENT), publish(store, CONTENT[::-1], "other")
    watch = DamageWatch(store)
    assert watch.look() == []
    assert watch.counts() == {"whole": 2, "corrupt": 0, "untrusted": 0}
    shutil.copytree(store.state, tmp_path / "whole", symlinks=True)
    harm, words = DAMAGES[damage]
    harm(store, snapshot)
    (found,) = watch.look()
    assert isinstance(found, Found)
    assert found.snapshot.digest == snapshot.digest != other.digest
    assert words in found.why
    assert watch.look() == []
    assert watch.counts() == {"whole": 1, "corrupt": 1, "untrusted": 0}
    shutil.copytree(tmp_path / "whole", store.state, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("names", "lock"))
    (mended,) = watch.look()
    assert mended == Found(found.snapshot, "")
    assert watch.look() == []
    assert watch.counts() == {"whole": 2, "corrupt": 0, "untrusted": 0}


def test_what_others_have_found_counts_until_it_is_whole(store: Store) -> None:
    """A disk has lost it before the first look: no file has changed since, and whoever has read all of it knows better."""
    snapshot = publish(store, CONTENT)
    whole = chunk(store, snapshot).read_bytes()
    flip(chunk(store, snapshot))
    watch = DamageWatch(store)
    assert watch.look() == [], "not everything is hashed"
    assert watch.counts()["corrupt"] == 0
    (found,) = watch.look({snapshot.digest: "somebody says so"})
    assert isinstance(found, Found) and "does not have the content that its name says" in found.why
    assert watch.counts() == {"whole": 0, "corrupt": 1, "untrusted": 0}
    chunk(store, snapshot).write_bytes(whole)
    assert watch.look({snapshot.digest: found.why}) == [Found(found.snapshot, "")]
    assert watch.look({snapshot.digest: "somebody is wrong"}) == [Found(found.snapshot, "")]
    assert watch.counts() == {"whole": 1, "corrupt": 0, "untrusted": 0}


@pytest.mark.parametrize(
    ("file", "words"), [("manifest.json", "its manifest was changed after it was published"), ("signature.json", "take the snapshot again")]
)
def test_a_manifest_that_was_changed_is_a_name_of_nothing(store: Store, file: str, words: str) -> None:
    snapshot = publish(store, CONTENT)
    watch = DamageWatch(store)
    watch.look()
    whole = (snapshot.directory / file).read_bytes()
    flip(snapshot.directory / file)
    (found,) = watch.look()
    assert isinstance(found, Unreadable)
    assert words in str(found.why)
    assert watch.look() == []
    (snapshot.directory / file).write_bytes(whole)
    assert watch.look() == [Found(snapshot, "")]


def test_a_key_that_is_revoked_takes_its_snapshots_along_and_another_brings_them_back(store: Store) -> None:
    snapshot = publish(store, CONTENT)
    watch = DamageWatch(store)
    assert watch.look() == []
    store.keyring.revoke(store.keyring.signing)
    (found,) = watch.look()
    assert isinstance(found, Unreadable) and "was revoked" in str(found.why)
    store.keyring.make()
    assert watch.look() == []
    store.sign("default", "small")
    assert watch.look() == [Found(snapshot, "")]


def test_damage_of_before_the_first_look_is_found_where_something_is_missing(store: Store) -> None:
    """What is there and has another content is found when it is staged: the first look hashes nothing."""
    snapshot = publish(store, CONTENT)
    chunk(store, snapshot).unlink()
    watch = DamageWatch(store)
    (found,) = watch.look()
    assert isinstance(found, Found) and "is missing" in found.why


def test_one_that_is_replaced_or_removed_is_no_damage(store: Store) -> None:
    publish(store, CONTENT)
    watch = DamageWatch(store)
    assert watch.look() == []
    publish(store, CONTENT[::-1], replace=True)
    assert watch.look() == []
    store.remove("default", "small")
    assert watch.look() == []


def test_only_what_was_written_to_is_hashed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, CONTENT)
    watch = DamageWatch(store)
    watch.look()
    monkeypatch.setattr(store.chunks, "read_into", pytest.fail)
    monkeypatch.setattr(store, "read_file", pytest.fail)
    assert watch.look() == []
