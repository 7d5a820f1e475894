"""What is on a node is looked at again and again: snapshots that others damage, weights that move, memory that others take of GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpumem.client.control import Control
from restore_agent.drivers.headroom import Headroom
from restore_agent.drivers.weights import Weights
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.sequences import inventory as module
from restore_agent.sequences.changes import Change
from restore_agent.sequences.inventory import Gpu, Inventory
from restore_agent.sequences.staging import Staging
from restore_agent.sequences.travel import Travel
from restore_agent.snapshots.catalog import Snapshot, Unreadable
from restore_agent.snapshots.compatibility import Incompatible, node_fits
from restore_agent.snapshots.manifest import GpuRecord, WeightsRecord
from restore_agent.snapshots.store import Store
from tests.worlds.gpumem_server import MIB, make_weights, served
from tests.worlds.snapshots import CRIU, publish
from tests.worlds.waiting import until

GIB = 1 << 30


class World:
    """An inventory, and what it has said. The driver is stood in for; `asked` are the questions that it was asked."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "state")
        self.headroom = Headroom()
        self.heard: list[Change] = []
        self.staging = Staging(self.store, folder / "memory", CRIU, None, self.headroom, self.heard.append)
        self.weights = Weights(folder / "server" / "gpumem.sock")
        self.view = self.weights.view
        self.asked: list[str] = []
        self.restoring = False
        driver: Any = SimpleNamespace(
            free=self._free, total=lambda: {"GPU-1": 80 * GIB}, gpus=lambda: GpuRecord(driver="1", names=("NVIDIA H200",), uuids=("GPU-1",))
        )
        self.inventory = Inventory(
            self.store,
            self.staging,
            Travel(self.store, self.heard.append),
            self.weights,
            driver,
            lambda: {"GPU-1": 2 * GIB},
            lambda: self.restoring,
            self.heard.append,
        )

    def _free(self) -> dict[str, int]:
        self.asked.append("free")
        return {"GPU-1": 30 * GIB}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.staging.close()
    await world.headroom.close()
    world.store.close()


async def test_gpus_are_looked_at_between_restores_and_told_as_they_were_seen(world: World) -> None:
    assert world.inventory.gpus == []
    world.restoring = True
    await world.inventory.look_at_gpus()
    assert world.asked == []
    world.restoring = False
    await world.inventory.look_at_gpus()
    (gpu,) = world.inventory.gpus
    assert gpu == Gpu("GPU-1", "NVIDIA H200", 80 * GIB, 32 * GIB, 30 * GIB, 0, 2 * GIB)
    assert gpu.others_bytes == 48 * GIB
    assert replace(gpu, pool_bytes=None).others_bytes is None, "gpumem runs, and does not say what it has"
    assert world.asked == ["free"]


async def test_what_was_damaged_on_the_disk_is_told_and_so_is_what_is_whole_again(world: World) -> None:
    snapshot, torn = publish(world.store, b"x" * 8192), publish(world.store, b"y" * 8192, "torn")
    chunk = world.store.chunks.path(snapshot.chunks[0].hash)
    content = chunk.read_bytes()
    async with world.inventory.watched():
        await until(lambda: world.inventory.gpus)
        chunk.unlink()
        (torn.directory / "manifest.json").write_text("torn")
        await until(lambda: len(world.heard) == 2)
        assert snapshot.digest in world.staging.damaged
        assert any(isinstance(each, Unreadable) and each.name == "torn" for each in world.heard)
        world.staging.unusable[snapshot.digest] = "it was damaged as it was staged"
        chunk.write_bytes(content)
        await until(lambda: len(world.heard) == 3)
    assert isinstance(world.heard[2], Snapshot) and world.heard[2].digest == snapshot.digest
    assert not world.staging.damaged and not world.staging.unusable, "it may be tried again"


async def test_what_nobody_needs_goes_once_a_torn_manifest_is_whole_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then nobody knows what that snapshot needs."""
    monkeypatch.setattr(module, "_STORE_SECONDS", 0.01)
    torn, gone = publish(world.store, b"x" * 8192, "torn"), publish(world.store, b"y" * 8192, "gone")
    manifest, chunk = torn.directory / "manifest.json", world.store.chunks.path(gone.chunks[0].hash)
    content = manifest.read_bytes()
    async with world.inventory.watched():
        manifest.write_text("torn")
        world.store.remove("default", "gone")
        assert chunk.exists()
        manifest.write_bytes(content)
        await until(lambda: not chunk.exists())
    assert world.store.chunks.path(torn.chunks[0].hash).exists()


async def test_what_the_node_lacked_for_a_snapshot_is_looked_for_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder that is mounted after the agent has begun."""
    monkeypatch.setattr(module, "_UNFIT_SECONDS", 0.0)
    (library := tmp_path / "library.so").write_bytes(b"x" * 8192)
    snapshot = publish(world.store, b"x" * 8192, fits=node_fits(CRIU, [library], None))
    library.rename(tmp_path / "away")
    with pytest.raises(Incompatible, match="No such file"):
        await world.staging.stage(snapshot)
    assert snapshot.digest in world.staging.unusable
    async with world.inventory.watched():
        await until(lambda: world.inventory.snapshots)
        assert snapshot.digest in world.staging.unusable
        world.heard.clear()
        (tmp_path / "away").rename(library)
        await until(lambda: world.heard)
    assert world.heard == [snapshot] and not world.staging.unusable


async def test_those_hear_whose_weights_were_moved(world: World, tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "weights.bin", 8 * MIB)
    record = WeightsRecord(region=weights.id.hex(), size=8 * MIB, parts=())
    lent, _ = publish(world.store, b"x" * 8192, weights=(record,)), publish(world.store, b"y" * 8192, "other")
    with served(tmp_path / "server", reserve=64 * MIB) as server:
        await world.inventory.look_at_weights()
        assert world.heard == []
        async with Control.connected(server.socket) as control:
            await control.fill(weights.layout, weights.sources, "host")
        await world.inventory.look_at_weights()
        assert world.heard == [lent]
        assert world.view.rung([record]) == WeightsRung.GPU
    await world.inventory.look_at_weights()
    assert world.heard == [lent, lent], "gpumem has ended"
