"""The one estimate: what makes a node sooner or later, and what it never counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.plan.estimate import has_room, ranked, seconds_to_fetch, seconds_to_serve, seconds_to_stage, seconds_to_start, total_bytes
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Gpu, Node, Rates, Residency, SourceState

GB = 10**9
RATES = Rates(disk_to_memory=2e9, memory_to_process=10e9, disk_to_gpu=4e9, memory_to_gpu=50e9, remote_to_disk=1e9)
NODE = Node("a", "a", synced=True, memory_total_bytes=100 * GB, memory_free_bytes=50 * GB, rates=RATES)
IMAGE = Residency("d", Rung.MEMORY, image_bytes=2 * GB, overhead_seconds=0.1)
PARKED = replace(IMAGE, rung=Rung.PARKED, parked_overhead_seconds=0.03)
WEIGHTS = replace(IMAGE, weights_bytes=16 * GB)


@pytest.mark.parametrize(
    ("residency", "seconds"),
    [
        (replace(IMAGE, rung=Rung.STANDBY), 0.1),
        (PARKED, 0.03),
        (replace(PARKED, weights_bytes=16 * GB, weights_rung=WeightsRung.GPU), 0.03),
        (replace(PARKED, weights_bytes=16 * GB, weights_rung=WeightsRung.MEMORY), 0.03 + 0.32),
        (IMAGE, 0.1 + 0.2),
        (replace(IMAGE, rung=Rung.DISK), 0.1 + 1.0 + 0.2),
        (replace(WEIGHTS, weights_rung=WeightsRung.GPU), 0.1 + 0.2),
        (replace(WEIGHTS, weights_rung=WeightsRung.MEMORY), 0.1 + 0.32),  # longer than the image, beside which they move
        (replace(WEIGHTS, weights_rung=WeightsRung.MEMORY, rung=Rung.STANDBY), 0.1 + 0.32),
        (replace(WEIGHTS, weights_rung=WeightsRung.DISK), 0.1 + 4.0),
        (replace(WEIGHTS, weights_rung=WeightsRung.DISK, rung=Rung.DISK), 0.1 + 1.0 + 4.0 + 0.2),  # one disk, one after the other
        (replace(IMAGE, unusable="another kernel"), math.inf),
        (replace(IMAGE, rung=Rung.ABSENT), math.inf),
        (replace(IMAGE, rung=Rung.ABSENT, sources=("b",)), 2.0 + 0.1 + 1.0 + 0.2),
        (replace(WEIGHTS, rung=Rung.ABSENT, sources=("b",)), 18.0 + 0.1 + 1.0 + 4.0 + 0.2),
        (replace(IMAGE, rung=Rung.ABSENT, sources=("b",), gpu_bytes=(1,)), math.inf),  # this node has no GPU
        (None, math.inf),
    ],
)
def test_seconds_to_serve(residency: Residency | None, seconds: float) -> None:
    assert seconds_to_serve(NODE, residency) == pytest.approx(seconds)


def test_a_node_that_has_measured_nothing_is_still_ordered() -> None:
    fresh = replace(NODE, rates=Rates())
    rungs = [replace(IMAGE, rung=rung, overhead_seconds=0.0) for rung in (Rung.PARKED, Rung.STANDBY, Rung.MEMORY, Rung.DISK)]
    rungs.append(replace(IMAGE, rung=Rung.ABSENT, overhead_seconds=0.0, sources=("b",)))
    estimates = [seconds_to_serve(fresh, residency) for residency in rungs]
    assert estimates == sorted(estimates) and len(set(estimates)) == 5 and not math.isinf(estimates[-1])


@pytest.mark.parametrize(
    ("free", "needed", "room"),
    [
        ([80, 80], [], True),
        ([], [], True),
        ([], [1], False),
        ([80], [79], True),
        ([80], [80], False),  # a resume needs headroom, too
        ([80, 10], [60, 5], True),
        ([80, 10], [5, 60], True),  # whichever comes first
        ([80, 10], [60, 20], False),
        ([80], [20, 20], False),  # each has a GPU of its own
    ],
)
def test_room_on_gpus(free: list[int], needed: list[int], room: bool) -> None:
    node = replace(NODE, gpus=tuple(Gpu(f"gpu-{index}", 80 * GB, size * GB) for index, size in enumerate(free)))
    residency = replace(IMAGE, gpu_bytes=tuple(size * GB for size in needed))
    assert has_room(node, residency) is room
    assert math.isinf(seconds_to_serve(node, residency)) is not room


@pytest.mark.parametrize(
    ("free", "needed", "holds", "room"),
    [
        ([2], [2], [2], True),  # what it holds is all that is free, and all that it needs: it resumes nothing
        ([2], [2], [], True),  # how much it holds is not known: what a restore would have taken
        ([2], [3], [2], False),  # it lacks one more, and nobody has it
        ([3], [3], [2], True),  # another one that is parked would give it up
        ([2, 2], [2, 2], [2, 2], True),
        ([], [], [], True),  # of an engine that uses no GPU
    ],
)
def test_a_parked_one_needs_what_it_does_not_hold_yet(free: list[int], needed: list[int], holds: list[int], room: bool) -> None:
    """Its own bytes count among the free ones, since it would give them up to others."""
    node = replace(NODE, gpus=tuple(Gpu(f"gpu-{index}", 80 * GB, size * GB) for index, size in enumerate(free)))
    parked = replace(PARKED, gpu_bytes=tuple(size * GB for size in needed), parked_bytes=tuple(size * GB for size in holds))
    assert has_room(node, parked) is room
    assert math.isinf(seconds_to_serve(node, parked)) is not room


def test_staging_counts_what_lies_on_disk() -> None:
    assert seconds_to_stage(NODE, IMAGE) == 0
    assert seconds_to_stage(NODE, replace(IMAGE, rung=Rung.DISK)) == pytest.approx(1.0)
    assert seconds_to_stage(NODE, replace(WEIGHTS, rung=Rung.DISK, weights_rung=WeightsRung.DISK)) == pytest.approx(5.0)
    assert seconds_to_stage(NODE, replace(WEIGHTS, rung=Rung.DISK, weights_rung=WeightsRung.MEMORY)) == pytest.approx(1.0)


def test_each_gpu_s_weights_are_fetched() -> None:
    """A residency tells what one GPU gets, since they are filled at once; over the network they come one after the other."""
    two = replace(WEIGHTS, rung=Rung.ABSENT, sources=("b",), gpu_bytes=(1, 1))
    assert total_bytes(two) == 34 * GB and seconds_to_fetch(NODE, two) == pytest.approx(34.0)
    assert seconds_to_fetch(NODE, WEIGHTS) == 0 and math.isinf(seconds_to_fetch(NODE, replace(two, sources=())))


def test_a_cold_start_takes_longer_where_less_memory_is_free() -> None:
    free = [seconds_to_start(replace(NODE, memory_free_bytes=size * GB)) for size in (100, 50, 1)]
    assert free == sorted(free) and free[0] < free[1] < free[2]
    assert math.isinf(seconds_to_start(replace(NODE, memory_free_bytes=0)))


def test_ranked_leaves_out_what_is_never() -> None:
    assert ranked({"b": 2.0, "never": math.inf, "a": 1.0, "b too": 2.0}) == ["a", "b", "b too"]


@given(
    rung=st.sampled_from([Rung.ABSENT, Rung.DISK, Rung.MEMORY, Rung.STANDBY]),
    weights=st.sampled_from([WeightsRung.DISK, WeightsRung.MEMORY]),
    image=st.integers(0, 10**12),
    size=st.integers(0, 10**12),
    overhead=st.floats(0.0, 10.0),
)
def test_a_rung_up_is_never_later(rung: Rung, weights: WeightsRung, image: int, size: int, overhead: float) -> None:
    residency = Residency("d", rung, image, size, weights, overhead_seconds=overhead, sources=("b",))
    here = seconds_to_serve(NODE, residency)
    assert seconds_to_serve(NODE, replace(residency, rung=Rung(rung + 1))) <= here
    assert seconds_to_serve(NODE, replace(residency, weights_rung=WeightsRung(weights + 1))) <= here


def test_what_a_store_alone_has_comes_as_fast_as_the_store_gives() -> None:
    node = replace(NODE, sources=(SourceState("s3://slow", 0.1e9), SourceState("s3://new", 0.0)))
    image = replace(IMAGE, rung=Rung.ABSENT, store="s3://slow")
    assert seconds_to_fetch(node, image) == pytest.approx(20.0)
    assert seconds_to_fetch(node, replace(image, sources=("b",))) == pytest.approx(2.0), "other agents have it, too"
    assert seconds_to_fetch(node, replace(image, store="s3://new")) == pytest.approx(2.0), "nothing has come from there yet"
