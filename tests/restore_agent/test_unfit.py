"""What comes of a snapshot that does not fit a node, how long it stays, and what it does for a start; from a store in a folder."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.sequences.disk_budget import DiskBudget
from restore_agent.sequences.second_best import lay_out_caches, lay_out_weights
from restore_agent.sequences.travel import Travel
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.compile_caches import keep
from restore_agent.snapshots.manifest import Manifest, beside_weights, layout_file
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unfit import Unfit, of_use
from restore_agent.transfer.layout import chunk_key
from tests.worlds.snapshots import draft
from tests.worlds.travelling import WEIGHTS, node, take
from tests.worlds.virtual_time import StandingClock

MIB = 1 << 20


def fits_nowhere(manifest: Manifest) -> None:
    raise Incompatible("it was taken with another driver")


class World:
    """A node that nothing fits, and a store that has `small`: pages, a compile cache, and weights that its engine published."""

    def __init__(self, folder: Path, origin: Store, store: Store) -> None:
        self.folder, self.origin, self.store, self.url = folder, origin, store, f"file://{folder}/remote"
        self.travel = Travel(store, lambda snapshot: None)
        self.unfit = self.travel.unfit = Unfit(store)

    async def refused(self, name: str = "small") -> None:
        with pytest.raises(Incompatible, match="another driver"):
            await self.travel.pull("default", name, "", [self.url], lambda progress: None, replace=True, fits=fits_nowhere)

    def here(self, name: str = "small") -> Snapshot:
        return self.unfit.catalog.get("default", name)

    def pages(self) -> list[Path]:
        return [
            path
            for path in self.store.state.rglob("*")
            if path.name in {chunk.hash for chunk in self.origin.get("default", "small").chunks}
        ]


def made(origin: Store, folder: Path) -> Snapshot:
    """As an adapter of an engine leaves it: the weights in a folder of its own, with a small file beside them."""
    model, cache = folder / "published" / "m1", folder / "cache"
    (cache / "aa").mkdir(parents=True)
    (cache / "aa/one.so").write_bytes(b"one" * 1000)
    model.parent.mkdir()
    taken = take(origin, model, name="plain")
    (record,) = taken.manifest.weights
    workspace = origin.workspace()
    keep(workspace, {"TRITON_CACHE_DIR": (cache, ["aa/one.so"])})
    layout = (taken.directory / layout_file(record)).read_bytes()
    for name, data in ((layout_file(record), layout), (beside_weights(record, "reading.json"), b"{}")):
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_bytes(data)
    with origin.chunks.lease() as lease:
        manifest = draft(lease, workspace, random.Random(3).randbytes(2 * MIB), "small", weights=(record,))
        return origin.publish(workspace, manifest, lease, replace=True)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    (tmp_path / "remote").mkdir()
    with node(tmp_path / "origin") as origin, node(tmp_path / "node", origin) as store:
        world = World(tmp_path, origin, store)
        await Travel(origin, lambda snapshot: None).push(made(origin, tmp_path), world.url, lambda progress: None)
        shutil.rmtree(tmp_path / "published")
        yield world
        world.unfit.close()


async def test_caches_and_published_weights_come_and_no_page(world: World) -> None:
    await world.refused()
    found = world.here()
    assert not list(world.store.names()) and not world.pages() and not world.travel.arriving
    assert {str(path.relative_to(found.directory)) for path in found.directory.rglob("*") if path.is_file()} == {
        "manifest.json",
        "signature.json",
        *of_use(found.manifest),
    }
    cache, checkpoints = world.folder / "laid-out", world.folder / "checkpoints"
    checkpoints.mkdir()
    lay_out_caches(world.unfit.catalog, found, {"TRITON_CACHE_DIR": cache})
    lay_out_weights(world.unfit.catalog, found, checkpoints)
    assert (cache / "aa/one.so").read_bytes() == b"one" * 1000
    assert (checkpoints / "m1/model.safetensors").read_bytes().endswith(WEIGHTS) and (checkpoints / "m1/reading.json").read_bytes() == b"{}"


async def test_it_comes_once_and_another_of_the_name_takes_its_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.refused()
    before = world.here()
    remote = world.folder / "remote"
    for chunk in remote.glob("chunks/*/*"):
        chunk.unlink()
    await world.refused()
    assert world.here().digest == before.digest, "nothing more was read"
    workspace = world.origin.workspace()
    keep(workspace, {"TRITON_CACHE_DIR": (world.folder / "cache", ["aa/one.so"])})
    with world.origin.chunks.lease() as lease:
        new = world.origin.publish(workspace, draft(lease, workspace, b"new" * MIB, "small"), lease, replace=True)
    await Travel(world.origin, lambda snapshot: None).push(new, world.url, lambda progress: None)
    await world.refused()
    assert world.here().digest == new.digest and not before.directory.exists()


async def test_what_a_source_has_otherwise_is_left_out_and_the_refusal_is_the_same(world: World, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = world.origin.get("default", "small")
    (name,) = [name for name in snapshot.manifest.files if name == "caches/000000"]
    path = world.folder / "remote" / chunk_key(snapshot.manifest.files[name].hash)
    path.write_bytes(b"x" * path.stat().st_size)
    await world.refused()
    with pytest.raises(NotFound):
        world.here()
    assert "what it has for cold starts did not come" in caplog.text


async def test_it_goes_when_all_of_it_has_come_or_the_disk_is_wanted(world: World) -> None:
    async def nowhere(snapshot: Snapshot) -> bool:
        return False

    async def stays(snapshot: Snapshot) -> None:
        raise AssertionError("what fits stays")

    await world.refused()
    await world.travel.pull("default", "small", "", [world.url], lambda progress: None, replace=True)
    with pytest.raises(NotFound):
        world.here()
    budget = DiskBudget(world.store, lambda total: 3 * MIB, lambda digest: False, nowhere, stays)
    budget.unfit = world.unfit
    world.store.remove("default", "small")
    await world.refused()
    assert world.here()
    await budget.make_room("another", 3 * MIB - 100_000)
    with pytest.raises(NotFound):
        world.here()


async def test_what_no_start_has_used_for_a_month_goes_with_the_next_that_comes(world: World) -> None:
    clock = StandingClock()
    await world.refused()
    world.unfit.close()
    Unfit(world.store, clock).used(world.here())
    for days, stays in ((29, True), (31, False)):
        clock.moment = days * 24 * 3600.0
        again = Unfit(world.store, clock)
        again.opened()
        again.close()
        assert again.has("default", "small", world.origin.get("default", "small").digest) is stays


def test_one_that_has_nothing_for_a_cold_start_opens_no_store(tmp_path: Path) -> None:
    with node(tmp_path / "node") as store:
        plain = take(store, tmp_path / "model")
        assert of_use(plain.manifest) == frozenset(), "its weights lie where their owner has put them"
        Unfit(store).remove("default", "small")
        assert not Unfit(store).clear() and not (store.state / "unfit").exists()
