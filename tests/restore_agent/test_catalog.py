"""What is on the disk as it is found: by name and by digest, trusted or refused, and whole."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from restore_agent.snapshots.catalog import Catalog, Corrupt, NotFound, Snapshot, Unreadable
from restore_agent.snapshots.keyring import Keyring, Untrusted
from restore_agent.snapshots.manifest import InvalidName, Manifest, PartRecord, WeightsRecord, layout_file
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unusable import Unusable
from tests.worlds.snapshots import draft, publish

CONTENT = random.Random(5).randbytes(64 * PAGE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


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


def spoil_manifest(snapshot: Snapshot) -> None:
    path = snapshot.directory / "manifest.json"
    path.write_text(path.read_text().replace(f'"model":"{snapshot.manifest.model}"', '"model":"another"'))


def sign_something_else(snapshot: Snapshot) -> None:
    keyring = Keyring(snapshot.directory.parent.parent / "keys")
    (snapshot.directory / "signature.json").write_bytes(keyring.sign(b"another manifest").encode())


def tear_signature(snapshot: Snapshot) -> None:
    os.truncate(snapshot.directory / "signature.json", 20)


def remove_signature(snapshot: Snapshot) -> None:
    (snapshot.directory / "signature.json").unlink()


def be_of_an_older_version(snapshot: Snapshot) -> None:
    (snapshot.directory / "signature.json").rename(snapshot.directory / "seal")


SPOILED: dict[str, tuple[Callable[[Snapshot], None], type[Unusable], str]] = {
    "an edited manifest": (spoil_manifest, Corrupt, "its manifest was changed after it was published; take the snapshot again"),
    "a signature of something else": (
        sign_something_else,
        Untrusted,
        "is not what key [0-9a-f]{16} has signed; take the snapshot again",
    ),
    "a torn signature": (tear_signature, Untrusted, "its signature is torn; take the snapshot again"),
    "no signature": (remove_signature, Untrusted, "it is not signed; take the snapshot again"),
    "an older version": (be_of_an_older_version, Corrupt, "was taken by an older zerowake, which did not sign; take the snapshot again"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_manifest_that_is_not_the_published_one_is_refused_and_listed_with_why(store: Store, how: str) -> None:
    snapshot = publish(store, CONTENT)
    spoil, error, words = SPOILED[how]
    spoil(snapshot)
    with pytest.raises(error, match=rf"{snapshot.digest[:12]}: .*{words}"):
        store.get("default", "small")
    (found,) = store.list()
    assert isinstance(found, Unreadable)
    assert (found.namespace, found.name) == ("default", "small")
    assert isinstance(found.why, error)


def test_a_manifest_that_another_node_signed_counts_once_its_key_is_trusted_and_until_it_is_revoked(store: Store, tmp_path: Path) -> None:
    """Whoever can write the folder cannot make a snapshot that the agent takes for its own."""
    other = Store(tmp_path / "other")
    foreign, key = publish(other, CONTENT), other.keyring.signing
    pem = (other.state / "keys" / "trusted" / f"{key}.pem").read_bytes()
    other.close()
    ours = publish(store, CONTENT)
    assert foreign.digest == ours.digest
    (ours.directory / "signature.json").write_bytes((foreign.directory / "signature.json").read_bytes())
    with pytest.raises(Untrusted, match=f"key {key}, which is not trusted here; `zerowake key trust` adds one, or take the snapshot again"):
        store.get("default", "small")
    store.keyring.trust(pem)
    assert store.get("default", "small") == ours
    store.keyring.revoke(key)
    with pytest.raises(Untrusted, match=f"key {key}, which was revoked; take the snapshot again"):
        store.get("default", "small")
    assert store.sign("default", "small") == ours
    assert store.signature(store.get("default", "small")).key == store.keyring.signing


def test_nothing_else_is_read_of_a_snapshot_that_is_not_trusted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = publish(store, CONTENT)
    tear_signature(snapshot)
    monkeypatch.setattr(Manifest, "decode", pytest.fail)
    with pytest.raises(Untrusted):
        store.get("default", "small")


def test_a_name_that_leads_to_another_s_snapshot_is_refused(store: Store, state: Path) -> None:
    """It is whole and signed, and was published under another name, by another namespace perhaps."""
    publish(store, CONTENT, "theirs")
    (state / "names" / "tenant").mkdir()
    (state / "names" / "default" / "theirs").rename(state / "names" / "tenant" / "ours")
    with pytest.raises(Corrupt, match="snapshot tenant/ours: what is there under its name is default/theirs@"):
        store.get("tenant", "ours")


@pytest.mark.parametrize("what", ["a chunk", "a manifest"])
def test_only_what_is_whole_is_signed_again(store: Store, what: str) -> None:
    snapshot = publish(store, CONTENT)
    before = (snapshot.directory / "signature.json").read_bytes()
    if what == "a chunk":
        store.chunks.path(snapshot.chunks[0].hash).write_bytes(b"?")
    else:
        spoil_manifest(snapshot)
    with pytest.raises(Corrupt):
        store.sign("default", "small")
    assert (snapshot.directory / "signature.json").read_bytes() == before
    with pytest.raises(NotFound):
        store.sign("default", "nothing")


def test_weights_are_looked_for_where_this_node_put_them_then_where_the_engine_has_them(store: Store, tmp_path: Path) -> None:
    model = tmp_path / "model"
    part = PartRecord(path="model.safetensors", offset=0, first_chunk=0, chunks=1)
    named = WeightsRecord(region="ab", size=1, parts=(part,), folder=str(model))
    own = WeightsRecord(region="cd", size=1, parts=(part.model_copy(update={"path": "checkpoints/0/model.safetensors"}),))
    workspace = store.workspace()
    (workspace / "weights").mkdir()
    for record in (named, own):
        (workspace / layout_file(record)).write_bytes(b"the layout")
    with store.chunks.lease() as lease:
        snapshot = store.publish(workspace, draft(lease, workspace, CONTENT, weights=(named, own)), lease, replace=False)
    assert [region.folder for region in store.regions(snapshot)] == [model, snapshot.directory]
    store.fetched_weights(named).mkdir(parents=True)
    assert store.regions(snapshot)[0].folder == model, "not all of it has come"
    (store.fetched_weights(named) / "model.safetensors").touch()
    assert store.regions(snapshot)[0].folder == store.fetched_weights(named)


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


def test_what_was_verified_is_not_read_again_until_it_was_written_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = publish(store, CONTENT, "one"), publish(store, CONTENT, "two")
    opened, get = list[str](), store.get
    monkeypatch.setattr(store, "get", lambda namespace, name: opened.append(name) or get(namespace, name))

    def listed() -> list[str]:
        opened.clear()
        return [each.manifest.name if isinstance(each, Snapshot) else f"no {each.name}" for each in store.list()]

    assert (listed(), opened) == (["one", "two"], ["one", "two"])
    assert (listed(), opened) == (["one", "two"], [])
    manifest = (one.directory / "manifest.json").read_bytes()
    spoil_manifest(one)
    assert (listed(), opened) == (["no one", "two"], ["one"])
    (one.directory / "manifest.json").write_bytes(manifest)
    assert (listed(), opened) == (["one", "two"], ["one"])
    other = publish(store, CONTENT[::-1], "two", replace=True)
    assert (listed(), opened) == (["one", "two"], ["two"])
    assert store.list()[1] == other != two
    store.remove("default", "one")
    assert (listed(), opened) == (["two"], [])
    store.keyring.revoke(store.keyring.signing)
    assert (listed(), opened) == (["no two"], ["two"]), "its key counts no more"
