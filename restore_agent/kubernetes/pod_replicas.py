"""The engines that run in this node's pods: of each its container and its replica, known by the uid of its pod."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from restore_agent.engine.engine import Engine
from restore_agent.kubernetes.calling_pod import CallingPod
from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod
from restore_agent.places.container import Container
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import Origin, Replica
from restore_agent.snapshots.catalog import Snapshot

_LEAVES = "its pod is being deleted"
_IS_ASKED = "its container is asked to end"


class PodReplicas:
    """Use `async with replicas.followed()`: until then nobody hears of pods that go."""

    def __init__(self, node: Node, node_pods: NodePods) -> None:
        self._node = node
        self._node_pods = node_pods
        self._containers: dict[str, Container] = {}  # that hold an engine, or are being restored into
        self._replicas: dict[str, Replica] = {}
        self._ending: set[str] = set()  # of pods whose containers know when they are killed

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """At the end of the block the agent lets go of the containers, whose engines run on."""
        self._node_pods.on_change(self._changed)
        try:
            yield
        finally:
            await self._node.idling.wake_all()
            for container in self._containers.values():
                container.let_go()

    def __contains__(self, pod: Pod) -> bool:
        """Whether its container holds an engine, so that it is needed until the pod goes."""
        return pod.metadata.uid in self._containers

    def hold(self, pod: Pod, container: Container) -> None:
        self._containers[pod.metadata.uid] = container

    def drop(self, pod: Pod) -> None:
        """Nothing was restored into it after all."""
        self._containers.pop(pod.metadata.uid, None)

    def restored(self, pod: Pod, replica: Replica) -> None:
        """It serves; where the pod has begun to go meanwhile, nothing new is sent to it."""
        uid = pod.metadata.uid
        self._replicas[uid] = replica
        if (container := self._containers.get(uid)) is not None:
            # Also while its pod stays: the kubelet ends a container whose liveness probe fails.
            container.placeholder.asked_to_end.add_done_callback(lambda _: self._is_asked(replica))
        if (now := self._node_pods.pods.get(uid)) is None or now.is_leaving:
            self._node.replicas.retire(replica.id, _LEAVES)

    def was_moving(self, caller: CallingPod) -> bool:
        """Whether an agent was killed as it put the engine in its container to sleep, or woke it; said once."""
        if moving := self._node.idling.was_moving(caller.replica_id):
            self._node.idling.notes.forget(caller.replica_id)
        return moving

    def _is_asked(self, replica: Replica) -> None:
        self._node.replicas.retire(replica.id, _IS_ASKED)
        self._node.idling.end(replica)

    def started(self, caller: CallingPod, snapshot: Snapshot | None, origin: Origin, engine: Engine, phases: Phases, why: str) -> Replica:
        """The same for an engine that was not restored here; `why` not. It may sleep."""
        asleep = self._node.idling.asleep(caller.replica_id) if snapshot and caller.placeholder.engine else None
        replica = self._node.replicas.add(
            caller.model,
            snapshot,
            origin,
            engine,
            phases,
            detail=why,
            namespace=caller.pod.metadata.namespace,
            replica_id=caller.replica_id,
            asleep=asleep,
        )
        if asleep:
            self._node.idling.take_over(replica)
        self.restored(caller.pod, replica)
        return replica

    def _changed(self, pod: Pod, gone: bool) -> None:
        """A pod that is being deleted gets no more requests, before its engine hears of it."""
        uid = pod.metadata.uid
        if (gone or pod.is_leaving) and (replica := self._replicas.get(uid)):
            self._node.replicas.retire(replica.id, _LEAVES)
        if pod.metadata.deletion_grace_period_seconds is not None and uid in self._containers and uid not in self._ending:
            self._ending.add(uid)
            self._containers[uid].ends_in(pod.metadata.deletion_grace_period_seconds)
        if gone:
            self._ending.discard(uid)
            self._containers.pop(uid, None)
            self._replicas.pop(uid, None)
