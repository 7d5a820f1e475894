"""What a scale-up from zero waits for in the cluster, by what the pod itself shows of it.

    pushed  →  there is a pod (KEDA and the controllers: `created`)  →  it has a node (`scheduled`)  →  the agent begins (`started`)

Moments are those at which the pod's watch tells of them, within milliseconds; the timestamps in its status are whole seconds. The last part
is the kubelet's and the runtime's together: neither says anything in between that is told as exactly.
"""

from __future__ import annotations

from collections.abc import Callable

from scaler.books.activation import Activations
from scaler.kubernetes.engine_pod import EnginePod
from zerowake_shared.phases import Phase


class Startups:
    """Listens to the informer of labelled pods. `model_of`: the model that a pod may serve; empty: none."""

    def __init__(self, activations: Activations, model_of: Callable[[EnginePod], str]) -> None:
        self._activations = activations
        self._model_of = model_of

    def changed(self, old: EnginePod | None, new: EnginePod | None) -> None:
        if new is None or (old is not None and old.spec.node_name == new.spec.node_name):
            return
        activation = self._activations.current(self._model_of(new))
        if activation is None:
            return
        activation.mark(Phase.CREATED)
        if new.spec.node_name:
            activation.mark(Phase.SCHEDULED)
