"""Which models a node's news concern, without a look at all that are declared.

    what it has    models whose snapshot or replicas the node has
    ours to make   models whose replicas are made here: they wait for any node at all
    spread         of models of which another node may come to have a copy (several are wanted, or a store has it), those of which the node
                   had the snapshot, or a replica
    open           those of which the last decision left something open, so that any node may be the one: it is where it cannot be restored,
                   or there are too few; and those that were declared anew since

What an agent tells of its node itself, free memory above all, is no news of its own. But whether a snapshot finds room on the GPUs of a
node that has it is compared at each such word, and at the news of any node, and the models of which that has changed are concerned, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from scaler.plan.copies import lacks_copies
from scaler.plan.declared import DeclaredModels
from scaler.plan.estimate import has_room
from scaler.plan.remote import cannot_restore
from scaler.plan.world import Gpu, Model, Node, NodeSet


class Concern:
    """Of the models that are declared."""

    def __init__(self, models: DeclaredModels) -> None:
        self._models = models
        self._open: set[str] = set()
        self._seen: dict[str, Node] = {}  # by address, as it was at its last news
        self._gpus: dict[str, tuple[Gpu, ...]] = {}  # by address, as they were at the last look

    def decided(self, model: Model, nodes: NodeSet, arriving: Collection[str]) -> None:
        """A decision is made about the model. arriving: names of nodes on which pods of it wait for their engines."""
        is_spread = self._models.is_spread(model.name)
        lacks = is_spread and (arriving or lacks_copies(nodes, model))
        if lacks or ((is_spread or nodes.having(model.snapshot)) and cannot_restore(nodes, model)):
            self._open.add(model.name)
        else:
            self._open.discard(model.name)

    def of(self, node: Node, nodes: Iterable[Node]) -> set[str]:
        """Names of the models that the node's news concern, some of which may not be declared any more. nodes: all that there are."""
        before = self._seen.get(node.address)
        self._seen[node.address] = node
        found = {replica.model for replica in node.replicas.values()}
        found.update(self._models.made_here)
        for snapshot in node.residencies:
            found.update(self._models.of(snapshot))
        if before is not None:
            found.update(self._spread(before))
        for other in nodes:
            if self._gpus.get(other.address) is not other.gpus:
                found |= self.of_room(other)
        return found

    def of_room(self, node: Node) -> set[str]:
        """Names of the models whose snapshot found room on the node's GPUs at the last look, and does not now, or the other way round."""
        before, found = self._gpus.get(node.address, node.gpus), set[str]()
        self._gpus[node.address] = node.gpus
        if before != node.gpus:
            then = replace(node, gpus=before)
            for snapshot, there in node.residencies.items():
                if there.gpu_bytes and has_room(node, there) != has_room(then, there):
                    found.update(self._models.of(snapshot))
        return found

    def take_open(self) -> set[str]:
        """Names of those for which any node's news count."""
        return self._open | set(self._models.take_new())

    def _spread(self, node: Node) -> Iterator[str]:
        """Those of which the node had something."""
        for snapshot in node.residencies:
            yield from filter(self._models.is_spread, self._models.of(snapshot))
        yield from filter(self._models.is_spread, (replica.model for replica in node.replicas.values()))
