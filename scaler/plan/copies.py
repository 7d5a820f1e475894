"""How many nodes keep a model's snapshot: as many as its owner wants, in domains that do not fail together.

A copy counts on a node that is heard, has it whole, and takes pods of the model: not on one that is cordoned, which keeps what it has. Of a
node that falls silent, or out, another copy is made, but not at once: an agent that is rolled is back within half a minute, and a node that
is not ready may be, too. A copy too many stays: a node that comes back has not become worse for it.

A copy is on disk; from there it goes up by the rung that its owner names, like any other. Where there are zones, another zone comes before
a node that would have it sooner; where there are none, each node is a domain of its own. A node whose GPUs are in use just now may keep a
copy, one whose GPUs are too small may not. Rejected: to move a copy for a better spread, for which one has to be removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from scaler.plan.actions import Stage
from scaler.plan.estimate import fits, seconds_to_fetch
from scaler.plan.remote import candidates, in_order
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, NodeSet, Residency, World

SHORT_SECONDS = 30.0  # an agent that is restarted is back before


def counting(nodes: Iterable[Node], model: Model) -> list[Node]:
    """The nodes whose copy counts."""
    return [node for node, there in NodeSet.of(nodes).having(model.snapshot) if _counts(node, there, model)]


def is_short(nodes: Iterable[Node], model: Model) -> bool:
    """Whether too few nodes keep the snapshot, and another one could fetch it."""
    nodes = NodeSet.of(nodes)
    return lacks_copies(nodes, model) and any(True for _ in _candidates(nodes, model))


def lacks_copies(nodes: Iterable[Node], model: Model) -> bool:
    """Whether too few nodes keep the snapshot, whoever else could fetch it."""
    return model.snapshot is not None and len(counting(nodes, model)) < model.copies


def lacking(nodes: Iterable[Node], model: Model) -> list[str]:
    """Of each node whose copy does not count, or that has none: why. Both by the nodes' names."""
    nodes = NodeSet.of(sorted(nodes, key=lambda node: node.name))
    could = {node.address for node, _ in _candidates(nodes, model)}
    counted = {node.address for node in counting(nodes, model)}
    others = (node for node in nodes if node.name and node.address not in counted)
    return [f"node {node.name}: {_why_not(node, model, node.address in could)}" for node in others]


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
    found = in_order(_candidates(world.nodes, model))
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
    return f"zone {node.zone}" if node.zone else f"node {node.called}"


def _counts(node: Node, there: Residency, model: Model) -> bool:
    if not node.synced or model.why_not_on(node):
        return False
    return there.rung > Rung.ABSENT and not there.unusable and model.digest in (None, there.digest)


def _why_not(node: Node, model: Model, could: bool) -> str:
    residency = node.residencies.get(model.snapshot) if model.snapshot is not None else None
    if not node.synced:
        return "its agent is not heard"
    if why := model.why_not_on(node):
        return why
    if could:
        return "it can fetch it"
    if residency is not None:
        return residency.unusable or "it has another snapshot of that name"
    if not node.peer_address and model.stored is None:
        return "it fetches nothing from other nodes (agent.keysSecret), and no store has it (spec.store)"
    return "nobody can give it the snapshot, or its GPUs are too small"


def _candidates(nodes: Iterable[Node], model: Model) -> Iterator[tuple[Node, Residency]]:
    """Also nodes with an older snapshot of the name, where its owner has said which one it is."""
    if model.snapshot is None:
        return
    for node, there in candidates(nodes, model.snapshot, model.digest, model.stored, model.pods, replacing=True):
        if fits(node, there):
            yield node, there
