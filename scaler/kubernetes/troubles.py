"""Why a model has no free replica, as Kubernetes has it: for the answer to a request that waited in vain.

What stands in the way of a pod is in its status, and whoever sent the request sees that least of all: a container that crashes again and
again, an image that cannot be pulled, no node with room. Read when it is asked for, so that it is what is so now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from scaler.kubernetes.engine_pod import EnginePod, EngineStatus
from scaler.kubernetes.scaled_object import ScaledObject

_WAITS = "waits: "
_ON_ITS_WAY = {"ContainerCreating", "PodInitializing"}


class Troubles:
    """Asks the pods of a model, then its ScaledObjects. `owner`: the namespace whose pods serve a model, empty: none's."""

    def __init__(
        self,
        pods: Callable[[str], Iterable[EnginePod]],
        objects: Callable[[str], Sequence[ScaledObject]],
        owner: Callable[[str], str],
    ) -> None:
        self._pods = pods
        self._objects = objects
        self._owner = owner

    def of(self, model: str) -> str:
        """A sentence; empty: nothing is odd."""
        pods = sorted(self._pods(model), key=lambda pod: pod.metadata.creation_timestamp, reverse=True)
        for pod in pods:
            if trouble := of_pod(pod):
                return f"pod {pod.metadata.name} {trouble}"
        if pods:
            return ""
        namespace = self._owner(model)
        objects = self._objects(model)
        if not objects:
            return f"it has no pod, and nothing makes one: no ScaledObject of namespace {namespace} has a trigger for it"
        names = ", ".join(each.metadata.name for each in objects)
        return f"it has no pod: KEDA has made none so far; `kubectl -n {namespace} describe scaledobject {names}` says why"


def failed_start(old: EnginePod | None, new: EnginePod | None) -> str:
    """Why a container of the pod has failed to start, if it has since `old`; empty: it has not, or for want of room.

    A kubelet's pause before the next try (CrashLoopBackOff, ImagePullBackOff) is no failure of its own, unless the failure was not seen.
    """
    trouble = of_pod(new) if new is not None else ""
    before = of_pod(old) if old is not None else ""
    if not trouble.startswith(_WAITS) or trouble == before or (before.startswith(_WAITS) and "BackOff" in trouble):
        return ""
    return trouble


def of_pod(pod: EnginePod) -> str:
    """What keeps this pod from becoming ready; empty: nothing that Kubernetes sees."""
    status = pod.status
    if pod.metadata.deletion_timestamp:
        return ""
    if status.phase == "Failed":
        said = ": ".join(part for part in (status.reason, status.message) if part)
        return "failed" + (f": {said}" if said else "")
    scheduled = next((each for each in status.conditions if each.type == "PodScheduled"), None)
    if scheduled is not None and scheduled.status == "False":
        return f"has no node: {scheduled.message or scheduled.reason}"
    for each in (*status.init_container_statuses, *status.container_statuses):
        if each.state.waiting is not None and each.state.waiting.reason not in {"", *_ON_ITS_WAY}:
            return f"{_WAITS}container {each.name}: {each.state.waiting.reason}{_more(each)}"
        if each.state.terminated is not None and each.state.terminated.exit_code:
            return f"{_WAITS}container {each.name} ended with exit code {each.state.terminated.exit_code} ({each.state.terminated.reason})"
    return ""


def _more(container: EngineStatus) -> str:
    waiting, before = container.state.waiting, container.last_state.terminated
    message = f": {waiting.message}" if waiting and waiting.message else ""
    return message + (f"; it ended with exit code {before.exit_code} before ({before.reason})" if before else "")
