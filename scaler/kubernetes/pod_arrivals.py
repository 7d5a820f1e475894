"""Pods that have been put on a node and have no engine yet: the node may have to fetch their snapshot first.

A pod is one of them from the moment at which it has a node. Its sandbox is made meanwhile, which takes most of a second: in that time the
fetch has begun, and the pod's agent, whose placeholder then calls, finds it under way (restore_agent/sequences/awaited.py). It is one no
more when it is ready, or has started cold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from scaler.kubernetes.engine_pod import EnginePod
from zerowake_shared import pod_contract


class PodArrivals:
    """Listens to the informer of labelled pods."""

    def __init__(self, model_of: Callable[[EnginePod], str], came: Callable[[str], None]) -> None:
        """`model_of`: the model that a pod may serve; empty: none. `came`: hears of the model of which one has come."""
        self._model_of = model_of
        self._came = came
        self._waiting: dict[str, tuple[str, str]] = {}  # uid of a pod → its model, and its node

    def nodes(self, model: str) -> Collection[str]:
        """Names of those on which pods of the model wait for their engines."""
        return {node for each, node in self._waiting.values() if each == model}

    def changed(self, old: EnginePod | None, new: EnginePod | None) -> None:
        before = self._waiting.pop(old.metadata.uid, None) if old else None
        if new is None or not _waits(new) or not (model := self._model_of(new)):
            return
        self._waiting[new.metadata.uid] = model, new.spec.node_name
        if before != (model, new.spec.node_name):
            self._came(model)


def _waits(pod: EnginePod) -> bool:
    annotations = pod.metadata.annotations
    is_marked = pod_contract.CONTAINER in annotations and pod_contract.COLD not in annotations
    return pod.is_on_a_node and is_marked and not pod.is_ready
