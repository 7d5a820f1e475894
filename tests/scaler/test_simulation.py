"""Event by event: queues at a disk, GPUs that are full, and what is fetched ahead."""

from __future__ import annotations

import numpy as np
import pytest

from scaler.simulate.episodes import Episodes, episodes
from scaler.simulate.policies import Cold, Lru, Policy
from scaler.simulate.rungs import NAMES, Rungs
from scaler.simulate.simulation import Cluster, Result, Simulation
from scaler.simulate.trace import Trace

RUNGS = Rungs(disk=5e9, peer=10e9, store=2e9, pinned=50e9, overhead=0.36, fill_seconds=0.26, parked_overhead=0.04)
ONE = Cluster(nodes=1, gpus=1, gpu_bytes=40e9, host_bytes=20e9, running_bytes=5e9, free_gpus=False)


def visits(*found: tuple[float, int]) -> Episodes:
    at, model = zip(*found, strict=True)
    return episodes(Trace(["a", "b"], np.array(at), np.array(model), np.zeros(len(at)), at[-1] + 1), 60, 1, 50)


def run(cluster: Cluster, policy: type[Policy], *found: tuple[float, int], rungs: Rungs = RUNGS) -> Result:
    sizes = np.array([10e9, 10e9])
    return Simulation(cluster, rungs, sizes.tolist(), visits(*found), policy(sizes, sizes), 1).run()


def names(result: Result) -> list[str]:
    return [NAMES[number] for number in result.rung]


def test_a_disk_reads_one_after_the_other() -> None:
    result = run(ONE, Cold, (0.0, 0), (0.5, 1))
    assert result.seconds == pytest.approx([0.36 + 2, 0.36 + 2 + 1.5])


def test_who_finds_no_gpu_waits_for_one() -> None:
    small = Cluster(nodes=1, gpus=1, gpu_bytes=20e9, host_bytes=20e9, running_bytes=5e9, free_gpus=False)
    result = run(small, Cold, (0.0, 0), (5.0, 1), (10.0, 1))
    assert result.seconds == pytest.approx([0.36 + 2, 61 - 5 + 0.36 + 2])


def test_bytes_on_a_full_node_come_over_the_network() -> None:
    two = Cluster(nodes=2, gpus=1, gpu_bytes=20e9, host_bytes=20e9, running_bytes=5e9, free_gpus=False)
    result = run(two, Lru, (0.0, 0), (100.0, 1), (200.0, 0), (220.0, 1))
    assert names(result)[:2] == ["disk", "disk"]
    assert set(names(result)[2:]) <= {"host", "peer"}


def test_parked_ones_wake_on_their_gpu() -> None:
    cluster = Cluster(nodes=1, gpus=1, gpu_bytes=40e9, host_bytes=20e9, running_bytes=5e9, free_gpus=True)
    parked = Rungs(disk=5e9, peer=10e9, store=2e9, pinned=50e9, overhead=0.36, fill_seconds=0.26, parked_overhead=0.04, parked_bytes=1e9)
    result = run(cluster, Lru, (0.0, 0), (100.0, 0), rungs=parked)
    assert (names(result), result.seconds[1]) == (["disk", "parked"], pytest.approx(0.04))


class Wishing(Lru):
    """Wishes for the other model from the first look on."""

    def wishes(self, at: float) -> list[int]:
        return [1] if at < 100 else []


def test_what_is_fetched_ahead_counts_once_it_is_there() -> None:
    at_once, later, never = (run(ONE, Wishing, *found) for found in (((0.0, 0), (1.0, 1)), ((0.0, 0), (50.0, 1)), ((0.0, 0), (50.0, 0))))
    assert names(at_once)[1] == "disk" and names(later)[1] == "host"
    assert at_once.seconds[1] == pytest.approx(0.36 + 3)  # begun at 0, put off by the two seconds of the one that was asked for
    assert (later.moved["wasted"], never.moved["wasted"]) == (0, 10e9)
    assert later.moved["ahead"] == 10e9


def test_bytes_that_few_nodes_have_come_from_them() -> None:
    far = Cluster(nodes=4, gpus=1, gpu_bytes=20e9, host_bytes=20e9, running_bytes=5e9, free_gpus=False, disk_copies=1)
    assert names(run(far, Cold, (0.0, 0), (1.0, 1))) == ["disk", "disk"]
    stored = Cluster(nodes=4, gpus=1, gpu_bytes=20e9, host_bytes=20e9, running_bytes=5e9, free_gpus=False, disk_copies=0)
    assert names(run(stored, Cold, (0.0, 0), (1.0, 1))) == ["remote", "remote"]


def test_models_go_where_memory_is_left() -> None:
    two = Cluster(nodes=2, gpus=1, gpu_bytes=40e9, host_bytes=10e9, running_bytes=5e9, free_gpus=False)
    assert names(run(two, Lru, (0.0, 0), (100.0, 1), (200.0, 0), (300.0, 1))) == ["disk", "disk", "host", "host"]
