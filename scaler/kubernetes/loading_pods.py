"""Pods that load their engines: they have a node, were not ready so far, and nothing of them has failed.

They count as use of their model (books/activity.py), whoever they were made for: a cold start takes longer than most clients wait.
"""

from __future__ import annotations

from collections.abc import Callable

from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.troubles import of_pod
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_LONGEST_SECONDS = 1800.0  # for which a pod counts, from when it was seen first: then it hangs


class LoadingPods:
    """Listens to the informer of labelled pods."""

    def __init__(self, model_of: Callable[[EnginePod], str], clock: Clock = SYSTEM_CLOCK) -> None:
        """`model_of`: the model that a pod may serve; empty: none."""
        self._model_of = model_of
        self._clock = clock
        self._loading: dict[str, tuple[str, float]] = {}  # uid of a pod → its model, and when it was seen first
        self._served: set[str] = set()  # uids of pods that were ready

    def of(self, model: str) -> bool:
        """Whether there is one."""
        now = self._clock.now()
        return any(each == model and now - since < _LONGEST_SECONDS for each, since in self._loading.values())

    def changed(self, old: EnginePod | None, new: EnginePod | None) -> None:
        if old is not None and (new is None or new.metadata.uid != old.metadata.uid):
            self._loading.pop(old.metadata.uid, None)
            self._served.discard(old.metadata.uid)
        if new is None:
            return
        uid = new.metadata.uid
        if new.is_ready:
            self._served.add(uid)
        if uid not in self._served and _loads(new) and (model := self._model_of(new)):
            self._loading[uid] = model, self._loading.get(uid, (model, self._clock.now()))[1]
        else:
            self._loading.pop(uid, None)


def _loads(pod: EnginePod) -> bool:
    """Unless it was ready."""
    was_ended = any(each.state.terminated or each.last_state.terminated for each in pod.status.container_statuses)
    return pod.is_on_a_node and not was_ended and not of_pod(pod)
