"""Where a snapshot could stand that does not stand there yet: nodes without it that can fetch it from those that have it, or from a store.

What it needs of a node's GPUs its holders say, or its manifest in the store. Whether it fits the node in all else (kernel, GPU's model,
libraries) its agent alone can say, which looks before it fetches; a refusal is put off and remembered. A node on which no pod of the model
is put (cordon, taints, labels: scheduling.py) is no candidate, and gives what it has to others. A node that has another snapshot of
the same name is no candidate: which of the two is to stay is not for a plan to say. Rejected: to copy every snapshot to every node, which
multiplies the disk that a model takes by the nodes, for nothing as long as a holder has room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.estimate import seconds_to_serve
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.scheduling import PodDemands, why_no_pod
from scaler.plan.world import Model, Node, Residency, Stored


def remote(
    nodes: Iterable[Node], snapshot: SnapshotName, digest: str | None, stored: Stored | None = None, pods: PodDemands | None = None
) -> list[tuple[Node, Residency]]:
    """The nodes that could fetch it, and what it would be there. digest: None: whichever there is, as long as nodes and store agree. pods:
    what its pods ask for; nodes that take none of them give it to others, and fetch nothing."""
    nodes = tuple(nodes)
    has = [(node, each) for node in nodes if node.synced and (each := node.residencies.get(snapshot)) and _is_source(node, each, digest)]
    kept = stored if stored and digest in (None, stored.digest) else None
    told: list[Residency | Stored] = [*(each for _, each in has), *([kept] if kept else [])]
    if len({each.digest for each in told}) != 1:
        return []
    digest, sources, url = told[0].digest, tuple(node.address for node, _ in has), kept.url if kept else ""
    cold = max((each.cold_seconds for _, each in has), default=0.0)
    sizes = told[0].image_bytes, told[0].weights_bytes, WeightsRung.ABSENT, told[0].gpu_bytes

    def there(node: Node) -> Residency:
        return Residency(digest, Rung.ABSENT, *sizes, sources=sources if node.peer_address else (), store=url, cold_seconds=cold)

    found = [(node, there(node)) for node in nodes if node.synced and (node.peer_address or kept) and snapshot not in node.residencies]
    found = [(node, each) for node, each in found if (each.sources or each.store) and not why_no_pod(node.name, node.standing, pods)]
    return sorted(found, key=lambda pair: (pair[0].name, pair[0].address))  # each scaler plans by itself: all take the same of two alike


def is_cramped(nodes: Iterable[Node], model: Model) -> bool:
    """Whether others have the snapshot, no replica of the model lives, and no node that has it could restore it now: there is no room for
    it, or it is damaged there, or the node's agent is not heard, or the node takes no pods of the model.
    """
    nodes = tuple(nodes)
    if model.snapshot is None or any(replica.model == model.name for node in nodes for replica in node.replicas.values()):
        return False
    if not remote(nodes, model.snapshot, model.digest, pods=model.pods):
        return False
    able = [node for node in nodes if node.synced and not model.why_not_on(node)]
    return all(math.isinf(seconds_to_serve(node, node.residencies.get(model.snapshot))) for node in able)


def _is_source(node: Node, residency: Residency, digest: str | None) -> bool:
    return bool(node.peer_address and residency.rung > Rung.ABSENT and not residency.unusable and digest in (None, residency.digest))
