"""The one estimate: seconds until a node serves a model. Every choice of a node uses it, and nothing else.

    from a snapshot:  overhead + max(image, weights)
        overhead      parked: a wake-up's own, which has nothing of CUDA in it; else a restore's
        image         parked, standby: 0; in memory: bytes / fill rate; on disk: the same, after bytes / staging rate
        weights       on the GPU: 0; in host memory: bytes / pinned rate; on disk: bytes / the disk's rate, which image and weights share
    remote:           all of its bytes / the network's rate, or that of its store where nobody else has it, and then as from disk
    without one:      a cold start's time, the longer the less of the node's memory is free
    no room on GPUs:  never; what parked engines hold counts as free, since they make room by themselves

Image and weights move at the same time, so the longer one counts; CUDA's resume is part of a restore's overhead, which is measured. Until
a node has measured anything the numbers below stand in: rough ones of a small machine, good enough to prefer memory over disk and disk
over nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Node, Residency

_K = TypeVar("_K")
_FILL_RATE = 4e9  # bytes a second
_DISK_RATE = 1e9
_NETWORK_RATE = 0.5e9
_PINNED_RATE = 10e9
_OVERHEAD_SECONDS = 0.05
_PARKED_OVERHEAD_SECONDS = 0.01
_COLD_SECONDS = 60.0
_GPU_HEADROOM = 64 << 20  # bytes that a resume needs beside what the suspend gave back (restore_agent/sequences/placement.py)


def seconds_to_serve(node: Node, residency: Residency | None) -> float:
    """From that snapshot. Infinite where it is absent and cannot be fetched, cannot be restored, or finds no room on the node's GPUs."""
    if residency is None or residency.unusable or not has_room(node, residency):
        return math.inf
    if residency.rung < Rung.DISK:
        there = replace(residency, rung=Rung.DISK, weights_rung=WeightsRung.DISK)
        return seconds_to_fetch(node, residency) + seconds_to_serve(node, there)
    overhead = residency.overhead_seconds or _OVERHEAD_SECONDS
    weights = _seconds_of_weights(node, residency)
    if residency.rung >= Rung.PARKED:
        return (residency.parked_overhead_seconds or min(_PARKED_OVERHEAD_SECONDS, overhead)) + weights
    if residency.rung >= Rung.STANDBY:
        return overhead + weights
    fill = residency.image_bytes / (node.rates.memory_to_process or _FILL_RATE)
    if residency.rung >= Rung.MEMORY:
        return overhead + max(fill, weights)
    from_disk = seconds_to_stage(node, residency)  # all that lies on disk, one after the other
    return overhead + max(from_disk + fill, weights)


def seconds_to_stage(node: Node, residency: Residency) -> float:
    """disk → memory, of the image, and of the weights where they are on disk too."""
    seconds = 0.0
    if residency.rung <= Rung.DISK:
        seconds += residency.image_bytes / (node.rates.disk_to_memory or _DISK_RATE)
    if residency.lacks_weights:
        seconds += residency.weights_bytes / (node.rates.disk_to_gpu or _DISK_RATE)
    return seconds


def seconds_to_fetch(node: Node, residency: Residency) -> float:
    """remote → disk, of all that the snapshot is: each GPU's weights, too. Infinite where nobody could give it."""
    if residency.rung > Rung.ABSENT:
        return 0.0
    if not residency.sources and not residency.store:
        return math.inf
    return total_bytes(residency) / (_rate_of_store(node, residency) or node.rates.remote_to_disk or _NETWORK_RATE)


def _rate_of_store(node: Node, residency: Residency) -> float:
    """That of the store which alone could give it, as it was measured on the node; 0: it was not, or others give it, too."""
    return next((each.rate for each in node.sources if each.name == residency.store and not residency.sources), 0.0)


def total_bytes(residency: Residency) -> int:
    """Image and weights, of which a residency tells one GPU's."""
    return residency.image_bytes + residency.weights_bytes * max(1, len(residency.gpu_bytes))


def seconds_to_start(node: Node) -> float:
    """Without a snapshot, by a cold start or for a capture. Infinite on a node with no free memory.

    How long the engine takes is the same everywhere; what a node adds is how much has to make room for it.
    """
    if not node.memory_free_bytes:
        return math.inf
    return _COLD_SECONDS * max(1.0, node.memory_total_bytes / node.memory_free_bytes)


def has_room(node: Node, residency: Residency) -> bool:
    """Whether each of its GPU shares finds a GPU of its own with so many bytes free, and a resume's headroom.

    A parked one resumes nothing. It has its GPUs, and lacks no more than what it does not hold of them yet; they are free by what it holds,
    too, since free bytes count all that parked engines would give up.
    """
    if not residency.gpu_bytes:
        return True
    needed = [share + _GPU_HEADROOM for share in residency.gpu_bytes]
    if residency.rung >= Rung.PARKED:
        holds = sorted(residency.parked_bytes or residency.gpu_bytes, reverse=True)
        shares = sorted(residency.gpu_bytes, reverse=True)
        needed = [share for share, held in zip_longest(shares, holds, fillvalue=0) if share > held]
    return _find_room(needed, (gpu.free_bytes for gpu in node.gpus))


def fits(node: Node, residency: Residency) -> bool:
    """As `has_room`, if nobody had any of the node's GPUs; of a snapshot that is not parked there."""
    needed = [share + _GPU_HEADROOM for share in residency.gpu_bytes]
    return not needed or _find_room(needed, (gpu.total_bytes for gpu in node.gpus))


def _find_room(needed: list[int], there: Iterable[int]) -> bool:
    """Each of the needed bytes on a GPU of its own."""
    has = sorted(there, reverse=True)
    return len(needed) <= len(has) and all(one >= needs for one, needs in zip(has, sorted(needed, reverse=True), strict=False))


def ranked(estimates: Mapping[_K, float] | Iterable[tuple[_K, float]]) -> list[_K]:
    """The keys with a finite estimate, the smallest first; equal ones as they came."""
    pairs = estimates.items() if isinstance(estimates, Mapping) else estimates
    return [key for key, seconds in sorted(pairs, key=lambda pair: pair[1]) if not math.isinf(seconds)]


def _seconds_of_weights(node: Node, residency: Residency) -> float:
    if not residency.weights_bytes or residency.weights_rung >= WeightsRung.GPU:
        return 0.0
    if residency.weights_rung >= WeightsRung.MEMORY:
        return residency.weights_bytes / (node.rates.memory_to_gpu or _PINNED_RATE)
    return residency.weights_bytes / (node.rates.disk_to_gpu or _DISK_RATE)
