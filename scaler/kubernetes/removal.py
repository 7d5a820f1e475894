"""The end of a ModelSnapshot: its artifact is taken from every node first, then its finalizer goes.

Replicas that run do not need the artifact; a restore that is under way keeps it, agent-side, until it has ended. Another object that names
the same artifact keeps it for good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from scaler.fleet.agent import AgentError, HasNone
from scaler.fleet.nodes import Nodes
from scaler.kubernetes import resources
from scaler.kubernetes.artifact import ABSENT_AGENT_SECONDS, Artifact, holders_of
from scaler.kubernetes.resources import ModelSnapshot, Pod, condition
from scaler.kubernetes.snapshot_writer import SnapshotWriter
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import NotFound
from zerowake_shared.kubernetes.informer import Informer
from zerowake_shared.kubernetes.resource import PODS

_UNSTAGE_SECONDS = 120.0


class Removal:
    """Removes what an object that is being deleted has on the nodes. `snapshots`: all objects."""

    def __init__(self, cluster: Cluster, writer: SnapshotWriter, snapshots: Informer[ModelSnapshot], nodes: Nodes) -> None:
        self._cluster = cluster
        self._writer = writer
        self._snapshots = snapshots
        self._nodes = nodes

    async def remove(self, snapshot: ModelSnapshot, pods: Collection[Pod]) -> float | None:
        """Goes on with it; returns the seconds after which to look again. `pods`: its capture pods. Raises: ClusterError."""
        if resources.FINALIZER not in snapshot.metadata.finalizers:
            return None
        if pods:
            for pod in pods:
                await self._cluster.delete(PODS, pod.metadata.namespace, pod.metadata.name, uid=pod.metadata.uid)
            return None  # their end brings us here again: an agent may be publishing what we are about to remove
        waits = "" if self._shared(snapshot) else await self._unstage(snapshot)
        if waits:
            ready = condition(snapshot, resources.CONDITION_READY, False, "", "Deleting", waits)
            await self._writer.status(snapshot, snapshot.status, ready)
            return ABSENT_AGENT_SECONDS
        rest = tuple(each for each in snapshot.metadata.finalizers if each != resources.FINALIZER)
        with contextlib.suppress(NotFound):
            await self._writer.finalizers(snapshot, rest)
        return None

    def _shared(self, snapshot: ModelSnapshot) -> bool:
        mine = (snapshot.metadata.namespace, snapshot.artifact_name)
        return any(
            (other.metadata.namespace, other.artifact_name) == mine and not other.metadata.deletion_timestamp
            for other in self._snapshots
            if other.key != snapshot.key
        )

    async def _unstage(self, snapshot: ModelSnapshot) -> str:
        """Takes the artifact from every node. Returns what is still waited for; empty: it is gone everywhere."""
        artifact = Artifact(snapshot, snapshot.spec.artifact.digest if snapshot.spec.artifact else "", self._nodes)
        waits = [
            f"node {each.name}, whose agent does not answer"
            for each in await holders_of(self._cluster, snapshot.status, artifact)
            if each.name not in artifact.answering
        ]
        for name, residency in artifact.held.items():
            agent = self._nodes.agent(artifact.answering[name].address) if name in artifact.answering else None
            if agent is None:
                continue
            try:
                await agent.unstage(artifact.name, residency.digest, seconds=_UNSTAGE_SECONDS)
            except HasNone:
                continue
            except AgentError as error:
                waits.append(f"node {name}: {error}")
        return f"the artifact is still to be removed from {'; '.join(waits)}" if waits else ""
