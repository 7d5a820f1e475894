"""Weights that an engine publishes in its pod: taken into the snapshot, lent to the pods after it, and nothing else of a tenant's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from zerowake_proto import gpumem_pb2

from gpumem.client.control import Control
from restore_agent.kubernetes.engine_packages import lay_out
from restore_agent.kubernetes.injection import injected
from restore_agent.places import checkpoints
from restore_agent.places.checkpoints import CheckpointError, take
from restore_agent.programs.on_kubernetes import pods_served
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin
from tests.worlds.captured import answer_of
from tests.worlds.image import PYTHON
from tests.worlds.kubelet import COMMAND, NAMESPACE, Kubelet
from tests.worlds.pool import Pool
from tests.worlds.published import BYTES, FOLDER, publishing
from tests.worlds.waiting import until

TOLD = {
    f"zerowake.dev/{key}": value
    for key, value in {"container": "engine", "port": "8000", "model": "small", "canary": '{"path": "/sum"}', "gpumem": "true"}.items()
}
ENV = [f"OWN_WEIGHTS={FOLDER}"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never(_: Path) -> bool:
    return False


def a_checkpoint(folder: Path) -> Path:
    (folder / "models/one").mkdir(parents=True)
    for name in ("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "README.md"):
        (folder / "models/one" / name).write_bytes(name.encode() * 1000)
    return folder


def test_a_checkpoint_s_files_are_copied_and_nothing_beside_them(tmp_path: Path) -> None:
    root = a_checkpoint(tmp_path / "root")
    folder = take(root, Path("/models/../models/one"), tmp_path / "state/0", never)
    assert names(folder) == ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert (folder / "model-1.safetensors").read_bytes() == (root / "models/one/model-1.safetensors").read_bytes()
    one = take(root, Path("/models/one/model-1.safetensors"), tmp_path / "state/1", never)
    assert one == tmp_path / "state/1/model-1.safetensors" and one.stat().st_size == 19000


def test_what_the_engine_has_written_is_moved_and_what_its_image_holds_stays(tmp_path: Path) -> None:
    root = a_checkpoint(tmp_path / "root")
    take(root, Path("/models/one"), tmp_path / "0", lambda path: path == Path("/models/one/model-1.safetensors"))
    assert names(root / "models/one") == ["README.md", "model-2.safetensors", "model.safetensors.index.json"]


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    """Nor do pipes keep the agent waiting."""
    a_checkpoint(tmp_path)
    root = tmp_path / "root"
    (root / "own").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="/models/one of the container cannot be read: No such file"):
        take(root, Path("/../models/one"), tmp_path / "0", never)
    os.mkfifo(root / "own/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors of the container, .* is no file"):
        take(root, Path("/own"), tmp_path / "1", never)
    (root / "own/model.safetensors").unlink()
    (root / "own/model.safetensors").symlink_to(tmp_path / "models/one/model-1.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        take(root, Path("/own"), tmp_path / "2", never)
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        take(root, Path("/"), tmp_path / "3", never)


def as_cached(root: Path) -> Path:
    """As a Hugging Face cache has it."""
    (root / "hub/blobs").mkdir(parents=True)
    (root / "hub/snapshots/main").mkdir(parents=True)
    for number in (1, 2):
        (root / f"hub/blobs/{number}").write_bytes(b"%d" % number * 1000)
        (root / f"hub/snapshots/main/model-{number}.safetensors").symlink_to(f"../../blobs/{number}")
    return root


def test_links_of_a_checkpoint_are_followed_within_its_volume(tmp_path: Path) -> None:
    root = as_cached(tmp_path / "root")
    folder = take(root, Path("/hub/snapshots/main"), tmp_path / "0", never)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "model-1.safetensors": b"1" * 1000,
        "model-2.safetensors": b"2" * 1000,
    }
    assert not any(path.is_symlink() for path in folder.iterdir())
    one = take(root, Path("/hub/snapshots/main/model-2.safetensors"), tmp_path / "1", never)
    assert (one.name, one.read_bytes()) == ("model-2.safetensors", b"2" * 1000)


def test_what_the_engine_has_written_behind_a_link_is_removed_too(tmp_path: Path) -> None:
    root = as_cached(tmp_path / "root")
    (root / "hub/snapshots/main/model-3.safetensors").symlink_to("../../blobs/1")
    take(root, Path("/hub/snapshots/main"), tmp_path / "0", lambda path: path.name not in ("2", "model-2.safetensors"))
    assert names(root / "hub/snapshots/main") == ["model-2.safetensors"]
    assert names(root / "hub/blobs") == ["2"], "which its image holds"


@pytest.fixture
def volumes(tmp_path: Path, needs_criu: None) -> Iterator[Path]:
    """A container's root with two volumes, and the second once more at another place."""
    root = tmp_path / "root"
    for name in ("one", "two", "again"):
        (root / name).mkdir(parents=True)
    for source, name, *how in (("tmpfs", "one", "-t", "tmpfs"), ("tmpfs", "two", "-t", "tmpfs"), (root / "two", "again", "--bind")):
        subprocess.run(["mount", *how, str(source), str(root / name)], check=True)
    yield root
    for name in ("again", "two", "one"):
        subprocess.run(["umount", str(root / name)], check=True)


@pytest.mark.parametrize(
    ("at", "leads"),
    [
        ("one/cache", "../../two/secret"),
        ("one/cache", "/two/secret"),
        ("one/cache", "hop"),
        ("one/cache", "../../../../../../../../two/secret"),
        ("one/cache", "/root-secret"),
        ("again/cache", "/two/secret"),
        ("here", "/two/secret"),
    ],
)
def test_a_link_of_a_checkpoint_leads_into_no_other_volume(volumes: Path, tmp_path: Path, at: str, leads: str) -> None:
    for secret in ("two/secret", "root-secret"):
        (volumes / secret).write_bytes(b"another's")
    folder = volumes / at
    folder.mkdir(parents=True)
    (folder / "hop").symlink_to("/two/secret")
    (folder / "model.safetensors").symlink_to(leads)
    with pytest.raises(CheckpointError, match=r"model\.safetensors of the container, .* leads to /(two/|root-)secret in another volume"):
        take(volumes, Path("/", at), tmp_path / "0", never)
    assert not (tmp_path / "0").exists()


def test_what_takes_a_file_s_place_while_it_is_copied_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = as_cached(tmp_path / "root")
    (root / "secret").write_bytes(b"s" * 1000)

    def exchanged(folder: Path) -> object:
        """Between the look and the copy."""
        (root / "hub/blobs/1").unlink()
        (root / "hub/blobs/1").symlink_to("../../secret")
        (root / "hub").rename(root / "before")
        (root / "hub").symlink_to("/")
        return SimpleNamespace(free=1 << 40)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", exchanged)
    folder = take(root, Path("/hub/snapshots/main"), tmp_path / "0", never)
    assert (folder / "model-1.safetensors").read_bytes() == b"1" * 1000


def test_a_file_for_which_the_disk_has_no_room_is_not_begun(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with (tmp_path / "root/model.safetensors").open("wb") as file:
        file.truncate(1 << 42)  # of holes
    with pytest.raises(CheckpointError, match=r"have 4194304 MiB, and .* are free"):
        take(tmp_path / "root", Path("/"), tmp_path / "0", never)
    assert not list((tmp_path / "0").iterdir())


@pytest.fixture
async def pool(short_folder: Path) -> AsyncIterator[Pool]:
    async with Pool(short_folder / "gpumem.sock") as started:
        yield started


async def regions(pool: Pool) -> list[tuple[str, int, bool]]:
    return [(each.namespace, each.leases, each.sealed) for each in (await pool.status()).regions]


async def evict(pool: Pool) -> None:
    async with Control.connected(pool.socket) as control:
        for each in (await control.status()).regions:
            await control.evict(gpumem_pb2.RegionRef(device=each.device, id=each.id))


@pytest.mark.usefixtures("needs_runc")
async def test_weights_that_a_pod_published_are_lent_to_the_next_ones(node: Node, kubelet: Kubelet, pool: Pool, tmp_path: Path) -> None:
    """The image has Python and nothing else: no zerowake, no protobuf, no blake3."""
    command = publishing(str(PYTHON), COMMAND, tmp_path / "weights")
    kubelet.adjust = injected(kubelet.placeholder, lay_out(node.store.state), pool.socket)
    async with pods_served(node, kubelet.placeholder, kubelet.placeholder.with_name("cri.sock"), kubelet.folder):
        async with kubelet.pod("capture", {"zerowake.dev/capture": "small"}, TOLD, command=command, env=ENV) as pod:
            assert await pod.exit_code() == 0, f"{pod.log()}{kubelet.events()}"
        assert "101 MB of weights are lent by gpumem" in await kubelet.event("capture", "Captured")
        snapshot = node.store.get(NAMESPACE, "small")
        (record,) = snapshot.manifest.weights
        assert record.size == BYTES and snapshot.manifest.image_bytes < BYTES, "they are not in the image as well"
        assert [part.path for part in record.parts] == ["checkpoints/0/model.safetensors"]
        await evict(pool)
        await node.stage(snapshot)
        assert await regions(pool) == [(NAMESPACE, 0, True)], "filled ahead of need, out of the snapshot's own copy"
        await evict(pool)
        labels = {"zerowake.dev/snapshot": "small"}
        async with (
            kubelet.pod("one", labels, TOLD, command=command, env=ENV),
            kubelet.pod("two", labels, TOLD, command=command, env=ENV),
        ):
            await until(lambda: len(node.replicas) == 2)
            assert snapshot.manifest.canary
            for replica in node.replicas:
                assert replica.origin is Origin.RESTORED, kubelet.events()
                assert await answer_of(replica.engine) == json.loads(snapshot.manifest.canary.answer)
            assert await regions(pool) == [(NAMESPACE, 2, True)], "one region for both"
        await until(lambda: not len(node.replicas))
    await node.remove(snapshot)
    assert not snapshot.directory.exists(), "and the copy goes with its snapshot"


@pytest.mark.usefixtures("needs_runc")
async def test_what_an_engine_names_and_is_not_there_is_said(node: Node, kubelet: Kubelet, pool: Pool) -> None:
    kubelet.adjust = injected(kubelet.placeholder, lay_out(node.store.state), pool.socket)
    says = 'echo \'{"directories": ["/nowhere"]}\' >/run/zerowake/control/weights.json && exec "$@"'
    command = ["sh", "-c", says, "sh", *COMMAND]
    async with (
        pods_served(node, kubelet.placeholder, kubelet.placeholder.with_name("cri.sock"), kubelet.folder),
        kubelet.pod("capture", {"zerowake.dev/capture": "small"}, TOLD, command=command) as pod,
    ):
        assert await pod.exit_code() == 1
    assert "the weights in /nowhere of the container cannot be read" in await kubelet.event("capture", "CaptureFailed")
