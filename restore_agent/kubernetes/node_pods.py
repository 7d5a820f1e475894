"""The pods of one node, as the API server has them, and what the agent writes about them: annotations and events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal

from restore_agent.kubernetes.pod import Pod
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import NotFound
from zerowake_shared.kubernetes.resource import PODS


class NodePods:
    """Use `async with NodePods.followed(node)`."""

    def __init__(self, cluster: Cluster, node: str) -> None:
        self.pods: dict[str, Pod] = {}  # of this node, by uid: one that took another's name is another one
        self.cluster = cluster
        self._informer = cluster.follow(PODS, Pod, fields=f"spec.nodeName={node}")
        self._listeners: list[Callable[[Pod, bool], None]] = []
        self._informer.on_change(self._changed)

    @classmethod
    @contextlib.asynccontextmanager
    async def followed(cls, node: str) -> AsyncIterator[NodePods]:
        """In the cluster that this pod runs in; outside of one that of `KUBECONFIG`. Returns when the node's pods are known.

        Raises:
            ClusterError: there is neither a service account nor a kubeconfig that can be used.
        """
        async with Cluster.connect(reporter="zerowake.dev/agent", instance=node) as cluster:
            found = cls(cluster, node)
            async with found._informer as informer:
                await informer.synced.wait()
                yield found

    def on_change(self, heard: Callable[[Pod, bool], None]) -> None:
        """`heard(pod, gone)` is called with each pod of the node that appears, changes or goes, and at once with those that are there.

        It is called again every ten minutes with those that are there still.
        """
        self._listeners.append(heard)
        for pod in list(self.pods.values()):
            heard(pod, False)

    async def pod(self, uid: str, namespace: str, name: str) -> Pod | None:
        """A pod of this node as the API server has it, by its uid; None: it is gone, or another one of that name. Raises ClusterError."""
        if pod := self.pods.get(uid):
            return pod
        try:
            found = await self.cluster.get(PODS, namespace, name, Pod)
        except NotFound:
            return None
        if found.metadata.uid != uid:
            return None
        if uid not in self.pods:  # the watch is slower than the answer, or broken just now; what is not in `pods` is taken for gone
            self._informer.show(namespace, name, found)
        return self.pods[uid]

    async def annotate(self, pod: Pod, annotations: Mapping[str, str]) -> None:
        """Raises ClusterError."""
        # The uid makes it this pod and no later one of its name.
        body = {"metadata": {"uid": pod.metadata.uid, "annotations": dict(annotations)}}
        await self.cluster.patch(PODS, pod.metadata.namespace, pod.metadata.name, body)

    async def event(self, pod: Pod, kind: Literal["Normal", "Warning"], reason: str, note: str, action: str) -> None:
        """Writes an event about a pod. Best effort: a failure is logged, since nothing may depend on events."""
        await self.cluster.event(PODS, pod.metadata, kind, reason, note, action)

    def _changed(self, old: Pod | None, new: Pod | None) -> None:
        if old and (new is None or new.metadata.uid != old.metadata.uid):
            self.pods.pop(old.metadata.uid, None)
            self._tell(old, gone=True)
        if new:
            self.pods[new.metadata.uid] = new
            self._tell(new, gone=False)

    def _tell(self, pod: Pod, *, gone: bool) -> None:
        for heard in self._listeners:
            heard(pod, gone)
