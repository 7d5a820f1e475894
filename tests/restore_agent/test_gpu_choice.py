"""Where several ranks' GPUs and weights go, and how room is made for each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.sequences.gpu_choice import GpuChoice, Suspended, staging_devices
from restore_agent.sequences.placement import HEADROOM, NoGpuMemory, OtherLinks
from restore_agent.snapshots.manifest import GpuRecord, Manifest, WeightsRecord
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish

GIB = 1 << 30
THEN, HERE = ("GPU-a", "GPU-b"), ("GPU-0", "GPU-1")


def record(gpu: str, region: str = "r") -> WeightsRecord:
    return WeightsRecord(region=region, size=GIB, parts=(), gpu=gpu)


def gpus(uuids: tuple[str, ...], way: str = "NV18") -> GpuRecord:
    links = tuple(tuple("X" if one == other else way for other in uuids) for one in uuids)
    return GpuRecord(driver="580", names=("H100",) * len(uuids), uuids=uuids, links=links)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two ranks, each with its weights on its own GPU."""
    found = publish(Store(tmp_path), b"x" * 8192, "pair", gpus={"GPU-a": GIB, "GPU-b": 2 * GIB}).manifest
    fits = found.fits.model_copy(update={"gpus": gpus(THEN)})
    return found.model_copy(update={"fits": fits, "weights": (record("GPU-a"), record("GPU-b", "s"))})


def tree(manifest: Manifest, **places: str) -> Suspended:
    return Suspended(
        manifest, manifest.gpus, THEN, {"GPU-a": "GPU-a", "GPU-b": "GPU-b"} | {f"GPU-{key}": value for key, value in places.items()}
    )


def test_weights_follow_the_gpu_that_they_were_lent_on(manifest: Manifest) -> None:
    pairs = {"GPU-a": "GPU-1", "GPU-b": "GPU-0"}
    assert tree(manifest).device(record("GPU-a"), pairs) == "GPU-1"
    assert tree(manifest).device(record("GPU-b"), pairs) == "GPU-0"
    assert tree(manifest).device(record(""), pairs) == "GPU-0", "of which nothing is said, where most of the tree is"
    assert Suspended(manifest, {}, (), {}).device(record("GPU-a"), {}) == "", "it uses none"


def test_weights_follow_a_tree_that_has_moved_since_its_snapshot(manifest: Manifest) -> None:
    """It was restored with its GPUs exchanged, and suspended again there."""
    moved = Suspended(manifest, {"GPU-0": GIB, "GPU-1": GIB}, HERE, {"GPU-a": "GPU-1", "GPU-b": "GPU-0"})
    assert moved.device(record("GPU-a"), {"GPU-0": "GPU-0", "GPU-1": "GPU-1"}) == "GPU-1"
    assert moved.resident({"GPU-a": {"GPU-1"}, "GPU-b": {"GPU-0", "GPU-1"}}) == {"GPU-1": {"GPU-1"}, "GPU-0": {"GPU-0", "GPU-1"}}


def test_weights_are_staged_to_their_own_rank_s_gpu(manifest: Manifest) -> None:
    assert staging_devices(manifest, record("GPU-b"), THEN) == ["GPU-b"]
    assert staging_devices(manifest, record("GPU-b"), HERE) == ["GPU-1"], "elsewhere the order of the GPUs is kept"
    alone = manifest.model_copy(update={"gpus": {"GPU-b": GIB}})
    assert staging_devices(alone, record("GPU-b"), THEN) == ["GPU-b", "GPU-a"], "one GPU's weights may wait on any"
    assert staging_devices(manifest.model_copy(update={"gpus": {}}), record(""), HERE) == []


class Node:
    """Two GPUs with `free` bytes each, and gpumem with as much more in its pools."""

    def __init__(self, free: int, pools: Mapping[str, int], way: str = "NV18") -> None:
        self._free = dict.fromkeys(HERE, free)
        self.pools = dict(pools)
        self.promised: dict[str, int] = {}
        self.parked: list[str] = []
        cuda: Any = SimpleNamespace(gpus=lambda: gpus(HERE, way), free=lambda: self._free, promised=self._promise)
        weights: Any = SimpleNamespace(resident=self._resident, make_room=self._make_room)
        self.choice = GpuChoice(cuda, weights, self._give_way)

    def _promise(self, needed: Mapping[str, int]) -> Any:
        self.promised = dict(needed)
        return contextlib.nullcontext()

    async def _resident(self, manifest: Manifest) -> dict[str, set[str]]:
        return {"GPU-a": {"GPU-1"}, "GPU-b": set()}

    async def _make_room(self, lacking: Mapping[str, int]) -> bool:
        for gpu, size in lacking.items():
            if self.pools.get(gpu, 0) >= size:
                self.pools[gpu] -= size
                self._free[gpu] += size
                return True
        return False

    async def _give_way(self, lacking: Mapping[str, int]) -> bool:
        if not self.parked:
            return False
        self._free[self.parked.pop()] += 4 * GIB
        return True


async def test_the_gpus_of_both_ranks_are_counted_as_taken(manifest: Manifest) -> None:
    node = Node(80 * GIB, {})
    async with node.choice.chosen(tree(manifest)) as pairs:
        assert pairs == {"GPU-a": "GPU-1", "GPU-b": "GPU-0"}, "the first rank's weights are on the second GPU here"
        assert node.promised == {"GPU-1": GIB, "GPU-0": 2 * GIB}


async def test_in_a_pod_nothing_is_chosen_and_room_is_made_on_its_own_gpu(manifest: Manifest) -> None:
    """Whatever is lent elsewhere, and wherever there is more room."""
    alone = manifest.model_copy(update={"gpus": {"GPU-a": 2 * GIB}, "fits": manifest.fits.model_copy(update={"gpus": gpus(("GPU-a",))})})
    suspended = Suspended(alone, alone.gpus, ("GPU-a",), {"GPU-a": "GPU-a"}, given=("GPU-0",))
    node = Node(2 * GIB, {"GPU-0": GIB, "GPU-1": 40 * GIB})
    async with node.choice.chosen(suspended) as pairs:
        assert pairs == {"GPU-a": "GPU-0"}
        assert node.promised == {"GPU-0": 2 * GIB}
    assert node.pools["GPU-1"] == 40 * GIB
    with pytest.raises(NoGpuMemory, match=r"more of GPU-0, which this pod was given"):
        async with Node(GIB, {"GPU-1": 40 * GIB}).choice.chosen(suspended):
            pytest.fail("another GPU was taken")


async def test_gpumem_makes_room_on_both_gpus(manifest: Manifest) -> None:
    node = Node(0, dict.fromkeys(HERE, 8 * GIB))
    async with node.choice.chosen(tree(manifest)) as pairs:
        assert set(pairs.values()) == set(HERE)


async def test_what_is_parked_gives_way_once_gpumem_has_nothing_more(manifest: Manifest) -> None:
    node = Node(0, {"GPU-0": 2 * GIB + HEADROOM})
    node.parked = ["GPU-1"]
    async with node.choice.chosen(tree(manifest)) as pairs:
        assert set(pairs.values()) == set(HERE)
    with pytest.raises(NoGpuMemory):
        async with Node(0, {"GPU-0": 2 * GIB + HEADROOM}).choice.chosen(tree(manifest)):
            pass


async def test_gpus_that_are_linked_otherwise_are_refused_before_anything_is_begun(manifest: Manifest) -> None:
    with pytest.raises(OtherLinks, match=r"NV18"):
        async with Node(80 * GIB, {}, way="PHB").choice.chosen(tree(manifest)):
            pass
