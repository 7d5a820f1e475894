"""A captured snapshot as the cluster's nodes hold it: one name and digest, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable

from scaler.books.snapshot_name import SnapshotName
from scaler.kubernetes.resources import Holder, ModelSnapshot
from scaler.plan.world import Node, Residency


class Artifact:
    """What the agents say about one snapshot's artifact.

    held: where it stands, by node's name. answering: nodes whose agents can be asked, by name.
    """

    def __init__(self, snapshot: ModelSnapshot, digest: str, nodes: Iterable[Node]) -> None:
        self.name = SnapshotName(snapshot.metadata.namespace, snapshot.artifact_name)
        self.held: dict[str, Residency] = {}  # by node's name
        self.answering: dict[str, Node] = {}
        for node in nodes:
            if not node.name:
                continue
            if node.synced:
                self.answering[node.name] = node
            residency = node.residencies.get(self.name)
            # One whose manifest cannot be read has no digest any more, but is what has become of it.
            if residency is not None and (digest in ("", residency.digest) or (residency.unusable and not residency.digest)):
                self.held[node.name] = residency

    def unusable(self, holders: Iterable[Holder]) -> str:
        """Why it can be restored nowhere, on one node of those that hold it; empty: on one of them it can, or nobody has it."""
        why = ""
        for holder in holders:
            found = self.held.get(holder.name)
            if found is None or not found.unusable:
                return ""
            why = why or f"on node {holder.name}: {found.unusable}"
        return why
