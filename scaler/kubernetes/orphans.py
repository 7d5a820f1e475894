"""Artifacts that a node has and no ModelSnapshot asks for: those of a node that was away while its object was deleted.

An object that is deleted waits for the nodes that have its artifact (removal.py), but not for one that the cluster has no more, nor where
its finalizer was taken by force, as an uninstall does in the end. When such a node comes back, its agent is asked to remove what nobody
asks for.

What is removed costs a capture, so everything has to speak for it. The agent says that a controller had it brought there (`managed`): what
a person took or pulled is not touched, nor what is pinned. No object names it, by a list that was read whole from the API server just now:
a list that fails, or cannot be understood, or is empty (a cluster whose objects are still to be restored from a backup) says nothing. That
was so all through the grace. And the agent refuses where anything uses it.
Rejected: to have agents look by themselves. Each would need the right to read all namespaces' ModelSnapshots.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

import msgspec

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import AgentError, HasNone
from scaler.fleet.nodes import Nodes
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, NODES, Artifact, Meta, Metadata
from scaler.plan.rungs import Rung
from scaler.plan.world import Node
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError

log = logging.getLogger(__name__)

_LOOKS = 10  # in one grace
_UNSTAGE_SECONDS = 120.0


class _Spec(msgspec.Struct, frozen=True):
    artifact: Artifact | None = None


class _Naming(msgspec.Struct, frozen=True):
    """A ModelSnapshot, as far as it names an artifact."""

    metadata: Metadata
    spec: _Spec

    @property
    def named(self) -> SnapshotName:
        return SnapshotName(self.metadata.namespace, self.spec.artifact.name if self.spec.artifact else self.metadata.name)


class Orphan(NamedTuple):
    """One artifact on one node."""

    address: str  # of its agent
    node: str
    snapshot: SnapshotName
    digest: str


class Orphans:
    """Removes them while `run` runs: a leader's, for as long as it leads.

    grace: seconds for which nobody has asked for one before it is removed.
    """

    def __init__(self, cluster: Cluster, nodes: Nodes, grace: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._cluster = cluster
        self._nodes = nodes
        self._grace = grace
        self._clock = clock
        self._since: dict[Orphan, float] = {}
        self._told: dict[Orphan, str] = {}  # why it stays

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(self._grace / _LOOKS)
            await self.look()

    async def look(self) -> None:
        """Once at all nodes. What has been nobody's for the whole grace is removed."""
        there = [each for node in self._nodes if node.synced and node.name for each in _managed(node)]
        if not there:
            self._since.clear()
            return
        try:
            named = await self._named()
        except ClusterError as error:
            log.warning("whether artifacts are nobody's is not known, and none is removed: %s", error)
            self._since.clear()
            return
        now = self._clock.now()
        self._since = {each: self._since.get(each, now) for each in there if named and each.snapshot not in named}
        self._told = {each: why for each, why in self._told.items() if each in self._since}
        for orphan, since in list(self._since.items()):
            if now - since >= self._grace:
                await self._remove(orphan)

    async def _named(self) -> set[SnapshotName]:
        """By all objects, those that are being deleted too. Raises ClusterError: not all are known."""
        try:
            return {each.named for each in await self._cluster.every(MODEL_SNAPSHOTS, _Naming)}
        except msgspec.MsgspecError as error:
            raise ClusterError(0, "a ModelSnapshot cannot be read", f"{error}: compare the CRD with the one of this version") from error

    async def _remove(self, orphan: Orphan) -> None:
        agent = self._nodes.agent(orphan.address)
        if agent is None:
            return
        what = f"{orphan.snapshot}@{orphan.digest[:12]}"
        try:
            await agent.unstage(orphan.snapshot, orphan.digest, seconds=_UNSTAGE_SECONDS, orphan=True)
        except HasNone:
            return
        except AgentError as error:
            if self._told.get(orphan) != str(error):
                self._told[orphan] = str(error)
                log.warning("%s on node %s is asked for by no ModelSnapshot, and stays: %s", what, orphan.node, error)
            return
        note = f"{what} was removed from the node: no ModelSnapshot of the cluster has asked for it for {self._grace:.0f} s"
        log.info("node %s: %s", orphan.node, note)
        try:
            node = await self._cluster.get(NODES, "", orphan.node, Meta)
        except ClusterError as error:
            log.info("node %s has no event of that: %s", orphan.node, error)
            return
        await self._cluster.event(NODES, node.metadata, "Normal", "OrphanRemoved", note, "Remove")


def _managed(node: Node) -> list[Orphan]:
    """What may be removed there, if nobody asks for it."""
    return [
        Orphan(node.address, node.name, name, each.digest)
        for name, each in node.residencies.items()
        if each.managed and each.digest and each.pinned is Rung.ABSENT
    ]
