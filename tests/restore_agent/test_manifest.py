"""The manifest: the same bytes for the same values, and nothing but what this version wrote is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from restore_agent.snapshots.chunks import Lease
from restore_agent.snapshots.compatibility import node_fits
from restore_agent.snapshots.manifest import (
    CHANGES_FILE,
    CONTAINER_FILE,
    AdapterRecord,
    FileRecord,
    InvalidManifest,
    InvalidName,
    Manifest,
    WeightsRecord,
    WeightsRegion,
    check_name,
    digest_of,
)
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import CRIU, draft


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    store = Store(tmp_path / "state")
    made = draft(Lease(store.chunks), store.workspace(), b"x" * 8192)
    store.close()
    return made


def changed(manifest: Manifest, **fields: object) -> bytes:
    return json.dumps(json.loads(manifest.encode()) | fields).encode()


def test_what_is_written_is_read_and_is_the_same_bytes_again(manifest: Manifest) -> None:
    data = manifest.encode()
    assert Manifest.decode(data) == manifest
    assert Manifest.decode(data).encode() == data
    assert digest_of(data) == digest_of(manifest.encode())
    assert digest_of(manifest.model_copy(update={"model": "other"}).encode()) != digest_of(data)


def test_one_of_an_older_zerowake_is_read() -> None:
    """As an agent of November 27 wrote it. Whatever it says is still there, and nothing of it has another meaning."""
    data = (Path(__file__).parent / "golden" / "manifest-4.json").read_bytes()
    found, said = Manifest.decode(data), json.loads(data)
    assert (found.name, found.engine.port, len(found.chunks), found.is_of_container) == ("chat", 8000, 2, False)
    again = json.loads(found.encode())
    assert {name: again[name] for name in said} == said


def test_what_a_wake_takes_beside_a_resume_is_told_where_there_is_any(manifest: Manifest) -> None:
    """An older zerowake reads a manifest that has none."""
    assert b"wake_bytes" not in manifest.encode() and manifest.gpus_awake == {}
    of_a_gpu = manifest.model_copy(update={"gpus": {"GPU-a": 900, "GPU-b": 800}, "wake_bytes": {"GPU-a": 272}})
    assert Manifest.decode(of_a_gpu.encode()) == of_a_gpu
    assert of_a_gpu.gpus_awake == {"GPU-a": 1172, "GPU-b": 800}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"moods": []}, "the manifest's moods is not known to this zerowake: it was taken by a newer one"),
        ({"version": 5}, "the manifest has version 5; this zerowake reads 4"),
    ],
)
def test_one_of_a_newer_zerowake_is_refused_in_words_after_a_roll_back(manifest: Manifest, fields: dict[str, object], why: str) -> None:
    """Part of it would be lost on this one: the model starts cold, and the snapshot is there for the newer one again."""
    with pytest.raises(InvalidManifest) as refused:
        Manifest.decode(changed(manifest, **fields))
    assert str(refused.value) == why


def test_sizes_are_those_of_its_parts(manifest: Manifest) -> None:
    assert manifest.page_bytes == 8192
    assert manifest.skeleton_bytes == sum(record.size for record in manifest.files.values()) > 0
    assert manifest.image_bytes == manifest.page_bytes + manifest.skeleton_bytes
    assert manifest.criu_bytes == manifest.files["images/inventory.img"].size
    assert manifest.written_bytes == 0
    written = manifest.model_copy(update={"files": {**manifest.files, CHANGES_FILE: FileRecord(size=7, hash="0" * 64)}})
    assert written.written_bytes == 7


def test_one_that_was_taken_in_a_container_has_that_file(manifest: Manifest) -> None:
    assert not manifest.is_of_container
    files = manifest.files | {CONTAINER_FILE: FileRecord(size=1, hash="0" * 64)}
    assert manifest.model_copy(update={"files": files}).is_of_container


def test_adapters_stay_in_the_order_in_which_they_are_asked_and_older_manifests_have_none(manifest: Manifest) -> None:
    adapters = tuple(AdapterRecord(name=name, path="/ask", answer=name) for name in ("sql", "poet"))
    again = Manifest.decode(manifest.model_copy(update={"adapters": adapters}).encode())
    assert again.adapters == adapters
    before = {key: value for key, value in json.loads(manifest.encode()).items() if key != "adapters"}
    assert Manifest.decode(json.dumps(before).encode()).adapters == ()


def weights(path: str, region: str = "ab") -> dict[str, object]:
    return {"region": region, "size": 1, "parts": [{"path": path, "offset": 0, "first_chunk": 0, "chunks": 1}]}


@pytest.mark.parametrize(("data", "why"), [(b"{", "no JSON object"), (b"[]", "no JSON object"), (b"{}", "version None")])
def test_what_is_no_manifest(data: bytes, why: str) -> None:
    with pytest.raises(InvalidManifest, match=why):
        Manifest.decode(data)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": 1}, "version 1; this zerowake reads 4"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"root_pid": "first"}, "root_pid"),
        ({"name": "../up"}, "is not allowed"),
        ({"files": {"../../etc/passwd": {"size": 1, "hash": "0" * 64}}}, "is not within the snapshot"),
        ({"files": {"/etc/passwd": {"size": 1, "hash": "0" * 64}}}, "is not within the snapshot"),
        ({"files": {"images/a": {"size": 1, "hash": "../../../../etc/passwd"}}}, "should match pattern"),
        ({"files": {"images/a": {"size": -1, "hash": "0" * 64}}}, "greater than or equal to 0"),
        ({"files": {"": {"size": 1, "hash": "0" * 64}}}, "is not within the snapshot"),
        ({"files": {"a\0b": {"size": 1, "hash": "0" * 64}}}, "is not within the snapshot"),
        ({"chunks": [{"size": 1, "hash": "../../keys/signing.pem"}]}, "should match pattern"),
        ({"chunks": [{"size": -(1 << 40), "hash": "0" * 64}]}, "greater than 0"),
        ({"weights": [weights("/models/a.safetensors")]}, "is not within the snapshot"),
        ({"weights": [weights("../../a.safetensors")]}, "is not within the snapshot"),
        ({"weights": [weights("a.safetensors", region="../up")]}, "region '../up' is none"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(manifest: Manifest, fields: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidManifest, match=why):
        Manifest.decode(changed(manifest, **fields))


def test_nothing_in_it_is_true_of_one_node_only(tmp_path: Path) -> None:
    """Two nodes that have the same file, each on its own disk, take the same snapshot."""
    made = []
    for node in ("one", "other"):
        root = tmp_path / node / "root"
        (root / "lib").mkdir(parents=True)
        (root / "lib" / "library.so").write_bytes(b"library")
        store = Store(tmp_path / node / "state")
        fits = node_fits(CRIU, [Path("/lib/library.so")], None, root, store.hashes)
        made.append(draft(Lease(store.chunks), store.workspace(), b"x" * 8192, fits=fits).encode())
        store.close()
    assert made[0] == made[1]


def test_weights_within_a_snapshot_are_named_by_where_they_are_in_it(tmp_path: Path) -> None:
    record = WeightsRecord.model_validate(weights("model.safetensors") | {"folder": str(tmp_path / "checkpoints/0")})
    region = WeightsRegion(record, b"layout", tmp_path / "checkpoints/0").within(tmp_path)
    assert ([part.path for part in region.record.parts], region.record.folder) == (["checkpoints/0/model.safetensors"], "")
    assert region.folder == tmp_path
    elsewhere = WeightsRegion(record, b"layout", Path("/models"))
    assert elsewhere.within(tmp_path) == elsewhere


@pytest.mark.parametrize("name", ["a", "a-b.c_d", "0" * 63])
def test_names_that_may_be_a_part_of_a_path(name: str) -> None:
    assert check_name("name", name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "a..b", ".", "0" * 64, "a\n"])
def test_names_that_may_not(name: str) -> None:
    with pytest.raises(InvalidName, match=r"name .* is not allowed"):
        check_name("name", name)
