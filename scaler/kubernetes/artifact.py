"""A captured snapshot as the cluster's nodes hold it: one name and digest, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable

from scaler.books.snapshot_name import SnapshotName
from scaler.kubernetes.resources import NODES, Location, Meta, ModelSnapshot, Status
from scaler.plan.world import Node, Residency
from zerowake_shared.clock import Clock
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import NotFound

ABSENT_AGENT_SECONDS = 30.0  # until an agent that does not answer is looked for again
UNKNOWN = "unknown"  # the rung on a node that nobody can ask


class Artifact:
    """What the agents say about one snapshot's artifact.

    nodes: all, as they were then. held: where it stands, by node's name. answering: nodes whose agents can be asked, by name. asleep: ids
    of replicas that sleep in pods.
    """

    def __init__(self, snapshot: ModelSnapshot, digest: str, nodes: Iterable[Node]) -> None:
        self.name = SnapshotName(snapshot.metadata.namespace, snapshot.artifact_name)
        self.nodes = tuple(nodes)
        self.held: dict[str, Residency] = {}  # by node's name
        self.answering: dict[str, Node] = {}
        self.asleep: set[str] = set()
        of = (snapshot.metadata.namespace, snapshot.model)
        for node in self.nodes:
            if not node.name:
                continue
            self.asleep |= sleepers_of(node).get(of, frozenset())
            if node.synced:
                self.answering[node.name] = node
            residency = node.residencies.get(self.name)
            # One whose manifest cannot be read has no digest any more, but is what has become of it.
            if residency is not None and (digest in ("", residency.digest) or (residency.unusable and not residency.digest)):
                self.held[node.name] = residency

    def unusable(self, holders: Iterable[Location]) -> str:
        """Why it can be restored nowhere, on one node of those that hold it; empty: on one of them it can, or nobody has it."""
        why = ""
        for holder in holders:
            found = self.held.get(holder.name)
            if found is None or not found.unusable:
                return ""
            why = why or f"on node {holder.name}: {found.unusable}"
        return why


class Absences:
    """Since when the agents that hold something do not answer. One that is restarted is back in seconds, and what it said still holds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}  # by node's name

    def aged(self, holders: Iterable[Location], artifact: Artifact) -> tuple[Location, ...]:
        """The holders; on which rung it stands is unknown where the agent was missed at one look, and still is at the next."""
        return tuple(self._aged(each, each.name in artifact.answering) for each in holders)

    def _aged(self, holder: Location, answers: bool) -> Location:
        if answers:
            self._since.pop(holder.name, None)
            return holder
        now = self._clock.now()
        # Looks come at other times, too; half of what is between two of them makes sure that one counts, however the timers fall.
        absent = now - self._since.setdefault(holder.name, now) > ABSENT_AGENT_SECONDS / 2
        return Location(holder.name, UNKNOWN) if absent else holder


def sleepers_of(node: Node) -> dict[tuple[str, str], frozenset[str]]:
    """Namespace and model → ids of its replicas that sleep in pods of the node."""
    found: dict[tuple[str, str], frozenset[str]] = {}
    for replica in node.replicas.values():
        if replica.sleeps is not None:
            of = (replica.namespace, replica.model)
            found[of] = found.get(of, frozenset()) | {replica.id}
    return found


async def holders_of(cluster: Cluster, status: Status, artifact: Artifact) -> tuple[Location, ...]:
    """Who has it by their own word, and who had it and can't be asked now, unless the node is gone. Raises: ClusterError."""
    found = {name: each.rung.name.lower() for name, each in artifact.held.items()}
    for listed in status.holders:
        if listed.name not in found and listed.name not in artifact.answering and await _exists(cluster, listed.name):
            found[listed.name] = listed.rung
    return tuple(Location(name, rung) for name, rung in sorted(found.items()))


async def _exists(cluster: Cluster, node: str) -> bool:
    try:
        await cluster.get(NODES, "", node, Meta)
    except NotFound:
        return False
    return True
