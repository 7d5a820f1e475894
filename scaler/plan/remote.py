"""Where a snapshot could stand that does not stand there yet: nodes without it that can fetch it from those that have it, or from a store.

What it needs of a node's GPUs its holders say, or its manifest in the store. Whether it fits the node in all else (kernel, GPU's model,
libraries) its agent alone can say, which looks before it fetches; a refusal is put off and remembered. A node on which no pod of the model
is put (cordon, taints, labels: scheduling.py) is no candidate, and gives what it has to others. A node that has another snapshot of
the same name is no candidate: which of the two is to stay is not for a plan to say. Rejected: to copy every snapshot to every node, which
multiplies the disk that a model takes by the nodes, for nothing as long as a holder has room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.estimate import seconds_to_serve
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.scheduling import PodDemands, why_no_pod
from scaler.plan.world import Model, Node, NodeSet, Residency, Stored


def remote(
    nodes: Iterable[Node], snapshot: SnapshotName, digest: str | None, stored: Stored | None = None, pods: PodDemands | None = None
) -> list[tuple[Node, Residency]]:
    """The nodes that could fetch it, and what it would be there. digest: None: whichever there is, as long as nodes and store agree. pods:
    what its pods ask for; nodes that take none of them give it to others, and fetch nothing."""
    return in_order(candidates(nodes, snapshot, digest, stored, pods))


def in_order(found: Iterable[tuple[Node, Residency]]) -> list[tuple[Node, Residency]]:
    """Each scaler plans by itself: all take the same of two alike."""
    return sorted(found, key=lambda pair: (pair[0].name, pair[0].address))


def candidates(
    nodes: Iterable[Node],
    snapshot: SnapshotName,
    digest: str | None,
    stored: Stored | None = None,
    pods: PodDemands | None = None,
    *,
    replacing: bool = False,
) -> Iterator[tuple[Node, Residency]]:
    """As `remote`, one by one, in the nodes' order. replacing: also nodes that have another snapshot of the name than `digest`, if that is
    given."""
    nodes = NodeSet.of(nodes)
    has = [(node, each) for node, each in nodes.having(snapshot) if node.synced and _is_source(node, each, digest)]
    kept = stored if stored and digest in (None, stored.digest) else None
    told: list[Residency | Stored] = [*(each for _, each in has), *([kept] if kept else [])]
    if len({each.digest for each in told}) != 1:
        return
    cold = max((each.cold_seconds for _, each in has), default=0.0)
    sizes = told[0].image_bytes, told[0].weights_bytes, WeightsRung.ABSENT, told[0].gpu_bytes
    of_store = Residency(told[0].digest, Rung.ABSENT, *sizes, store=kept.url if kept else "", cold_seconds=cold)
    of_peers = replace(of_store, sources=tuple(node.address for node, _ in has))
    others = {node.address for node, each in nodes.having(snapshot) if not (replacing and digest and each.digest not in ("", digest))}
    for node in nodes:
        there = of_peers if node.peer_address else of_store
        if not node.synced or node.address in others or not (there.sources or there.store):
            continue
        if node.standing is None or not why_no_pod(node.name, node.standing, pods):
            yield node, there


def is_cramped(nodes: Iterable[Node], model: Model) -> bool:
    """Whether others have the snapshot, no replica of the model lives, and no node that has it could restore it now: there is no room for
    it, or it is damaged there, or the node's agent is not heard, or the node takes no pods of the model.
    """
    nodes = NodeSet.of(nodes)
    if model.snapshot is None or not cannot_restore(nodes, model):
        return False
    return any(True for _ in candidates(nodes, model.snapshot, model.digest, pods=model.pods))


def cannot_restore(nodes: Iterable[Node], model: Model) -> bool:
    """Whether no replica of the model lives, and no node that has its snapshot could restore it now, whoever else could fetch it."""
    nodes = NodeSet.of(nodes)
    if model.snapshot is None or nodes.running(model.name):
        return False
    able = (pair for pair in nodes.having(model.snapshot) if pair[0].synced and not model.why_not_on(pair[0]))
    return all(math.isinf(seconds_to_serve(*pair)) for pair in able)


def _is_source(node: Node, residency: Residency, digest: str | None) -> bool:
    return bool(node.peer_address and residency.rung > Rung.ABSENT and not residency.unusable and digest in (None, residency.digest))
