"""How many nodes keep a model's snapshot: as many as its owner wants, in domains that do not fail together.

A copy counts on a node that is heard and has it whole. Of a node that falls silent another copy is made, but not at once: an
agent that is rolled is back within half a minute. A copy too many stays: a node that comes back has not become worse for it.

A copy is on disk; from there it goes up by the rung that its owner names, like any other. Where there are zones, another zone comes before
a node that would have it sooner; where there are none, each node is a domain of its own. A node whose GPUs are in use just now may keep a
copy, one whose GPUs are too small may not. Rejected: to move a copy for a better spread, for which one has to be removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from scaler.plan.actions import Stage
from scaler.plan.estimate import has_room, seconds_to_fetch
from scaler.plan.remote import remote
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, Residency, World

SHORT_SECONDS = 30.0  # an agent that is restarted is back before


def counting(nodes: Iterable[Node], model: Model) -> list[Node]:
    """The nodes whose copy counts."""
    return [node for node in nodes if _counts(node, model)]


def is_short(nodes: Iterable[Node], model: Model) -> bool:
    """Whether too few nodes keep the snapshot, and another one could fetch it."""
    nodes = tuple(nodes)
    if model.snapshot is None or len(counting(nodes, model)) >= model.copies:
        return False
    return bool(_candidates(nodes, model))


def copy(world: World, model: Model, later: list[float]) -> Stage | None:
    """The next copy that is to be made. One at a time, which each that comes after can be fetched from, too."""
    if model.snapshot is None or not is_short(world.nodes, model):
        return None
    due = world.short_since.get(model.name, world.now) + SHORT_SECONDS
    if due > world.now:
        later.append(due)
        return None
    counted = counting(world.nodes, model)
    taken = {domain(node) for node in counted}
    found = _candidates(world.nodes, model)
    for node, there in sorted(found, key=lambda pair: (domain(pair[0]) in taken, seconds_to_fetch(*pair))):
        until = world.put_off.get((node.address, there.digest, Rung.DISK), -math.inf)
        if until > world.now:
            later.append(until)
            continue
        beside = "; no node of another domain could" if domain(node) in taken else ""
        why = f"{len(counted)} of {model.copies} copies stand where they count{beside}"
        return Stage(node.address, model.name, model.snapshot, there.digest, Rung.DISK, why, there.store)
    return None


def domain(node: Node) -> str:
    """What fails together with the node: its zone, else itself."""
    return f"zone {node.zone}" if node.zone else f"node {node.name or node.address}"


def _counts(node: Node, model: Model) -> bool:
    residency = node.residencies.get(model.snapshot) if model.snapshot is not None else None
    if residency is None or not node.synced:
        return False
    return residency.rung > Rung.ABSENT and not residency.unusable and model.digest in (None, residency.digest)


def _candidates(nodes: Iterable[Node], model: Model) -> list[tuple[Node, Residency]]:
    if model.snapshot is None:
        return []
    found = remote((_known(node, model) for node in nodes), model.snapshot, model.digest, model.stored)
    return [(node, there) for node, there in found if has_room(_empty(node), there)]


def _known(node: Node, model: Model) -> Node:
    """The node without an older snapshot of the name, where its owner has said which one it is."""
    residency = node.residencies.get(model.snapshot) if model.snapshot is not None else None
    if residency is None or not model.digest or residency.digest in ("", model.digest):
        return node
    return replace(node, residencies={name: each for name, each in node.residencies.items() if name != model.snapshot})


def _empty(node: Node) -> Node:
    return replace(node, gpus=tuple(replace(gpu, free_bytes=gpu.total_bytes) for gpu in node.gpus))
