"""Pods with a snapshot's label that started cold all the same, and why: told where people look, since nothing else about them is odd.

Whoever leaves such a pod as it is writes the reason on it (annotation `cold`): the webhook, which alone knows it when the pod is made, and
whose warnings nobody reads where a ReplicaSet makes pods; or the agent, where a restore failed. Where the webhook did not answer, as a
replica of it was lost with its node a moment before, the pod has no mark at all. The leader makes of it a condition of the ModelSnapshot,
and an event of the pod. The newest pod counts: what stands in the way of that one stands in the way of the next.
A snapshot is looked at whenever one of its pods comes, so its pods are kept by it: a look costs as much as the snapshot has pods, however
many there are of others.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable
from typing import Protocol

from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.events import Events
from scaler.kubernetes.resources import CONDITION_READY, CONDITION_RESTORES, Condition, ModelSnapshot, condition
from zerowake_shared import pod_contract
from zerowake_shared.clock import Clock
from zerowake_shared.kubernetes.informer import Key
from zerowake_shared.kubernetes.resource import PODS

_UNASKED = "zerowake's webhook did not answer when it was made"
_NEW_SECONDS = 300.0  # an older pod's event was told by whoever led then


class Pods(Protocol):
    """An Informer of pods with the label, which tells of each that is there already, too."""

    def on_change(self, callback: Callable[[EnginePod | None, EnginePod | None], None]) -> None: ...


class ColdStarts:
    """What the labelled pods' annotations say. `pods`: the running informer of all pods with the label."""

    def __init__(self, events: Events, pods: Pods, clock: Clock) -> None:
        self._events = events
        self._clock = clock
        self._told: set[str] = set()  # uids
        self._by_snapshot: dict[Key, dict[str, EnginePod]] = {}  # snapshot → its pods by name
        pods.on_change(self._changed)

    async def tell(self, key: Key) -> None:
        """An event for each pod of this snapshot that the webhook left as it is. Failed restores are told by the agent."""
        for pod in self._of(key):
            why = _why(pod)
            made = calendar.timegm(time.strptime(pod.metadata.creation_timestamp, "%Y-%m-%dT%H:%M:%SZ"))
            if not why or pod_contract.CONTAINER in pod.metadata.annotations or self._clock.wall() - made > _NEW_SECONDS:
                continue
            if pod.metadata.uid not in self._told:
                self._told.add(pod.metadata.uid)
                await self._events.event(PODS, pod.metadata, "Warning", "ColdStart", f"its engine starts cold: {why}", "Restore")

    def condition(self, snapshot: ModelSnapshot) -> Condition | None:
        """Whether pods are restored from this snapshot, which is Ready; None: there was no pod since, and nothing is known anew."""
        ready = snapshot.status.condition(CONDITION_READY)
        since = ready.last_transition_time if ready else ""
        pods = [pod for pod in self._of(snapshot.key) if pod.metadata.creation_timestamp > since]
        if not pods:
            return None
        newest = max(pods, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))
        why = _why(newest)
        if not why:
            return condition(snapshot, CONDITION_RESTORES, True, "Restored", "", "")
        cold = sum(bool(_why(pod)) for pod in pods)
        others = f", and {cold - 1} more did" if cold > 1 else ""
        message = f"pod {newest.metadata.name} started cold{others}: {why}"
        return condition(snapshot, CONDITION_RESTORES, False, "", "ColdStart", message)

    def _of(self, key: Key) -> list[EnginePod]:
        return [
            pod
            for pod in self._by_snapshot.get(key, {}).values()
            if not pod.metadata.deletion_timestamp and pod.metadata.annotations.get(pod_contract.RESTORE) != "false"
        ]

    def _changed(self, old: EnginePod | None, new: EnginePod | None) -> None:
        if old is not None:
            pods = self._by_snapshot.get(_snapshot_of(old), {})
            pods.pop(old.metadata.name, None)
            if not pods:
                self._by_snapshot.pop(_snapshot_of(old), None)
            if new is None or new.metadata.uid != old.metadata.uid:
                self._told.discard(old.metadata.uid)
        if new is not None:
            self._by_snapshot.setdefault(_snapshot_of(new), {})[new.metadata.name] = new


def _why(pod: EnginePod) -> str:
    """Why it started cold; empty: it did not."""
    annotations, is_captured = pod.metadata.annotations, pod_contract.CAPTURE in pod.metadata.labels
    return annotations.get(pod_contract.COLD, "") or ("" if pod_contract.CONTAINER in annotations or is_captured else _UNASKED)


def _snapshot_of(pod: EnginePod) -> Key:
    return pod.metadata.namespace, pod.metadata.labels.get(pod_contract.SNAPSHOT, "")
