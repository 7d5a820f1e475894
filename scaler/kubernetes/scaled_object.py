"""KEDA's `ScaledObject` as far as the scaler reads it: which model it scales, what, and by which rules of its owner.

Keys of the trigger that end in `FromEnv` name a variable of the workload's container, whose value KEDA finds and tells in its calls only:
here such a trigger is none. A model that nothing else declares is then known to KEDA alone, and requests for it are not.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from scaler.books.trigger import FROM_ENV, BadTrigger, Trigger, parse_trigger
from scaler.kubernetes.resources import Metadata
from zerowake_shared.kubernetes.resource import Resource

TRIGGER_TYPES = ("external-push", "external")
_PAUSED = "autoscaling.keda.sh/paused"
_PAUSED_REPLICAS = "autoscaling.keda.sh/paused-replicas"
_PAUSED_SCALE_OUT = "autoscaling.keda.sh/paused-scale-out"
_FALSE = ("0", "f", "F", "false", "False", "FALSE")  # KEDA takes whatever is no boolean for true
_DEFAULT_MAX_REPLICAS = 100  # KEDA's
_KNOWN_TARGETS = {("apps/v1", "Deployment"): "deployments", ("apps/v1", "StatefulSet"): "statefulsets"}


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    """A part of an object, under the API's names."""


class TargetRef(_Part, frozen=True):
    """What is scaled, in the same namespace. The defaults are KEDA's."""

    name: str = ""
    api_version: str = "apps/v1"
    kind: str = "Deployment"


class TriggerSpec(_Part, frozen=True):
    """One trigger; its metadata is what KEDA sends the scaler."""

    type: str = ""
    metadata: dict[str, str] = {}
    metric_type: str = ""


class Behavior(_Part, frozen=True):
    """How fast the HPA may scale."""

    scale_up: dict[str, Any] | None = None


class HpaConfig(_Part, frozen=True):
    """What is passed on to the HPA."""

    behavior: Behavior | None = None


class Advanced(_Part, frozen=True):
    """What few ScaledObjects have."""

    horizontal_pod_autoscaler_config: HpaConfig | None = None
    scaling_modifiers: dict[str, Any] | None = None


class Spec(_Part, frozen=True):
    """What the owner of a ScaledObject asks for."""

    scale_target_ref: TargetRef = TargetRef()
    min_replica_count: int | None = None
    max_replica_count: int | None = None
    triggers: tuple[TriggerSpec, ...] = ()
    advanced: Advanced | None = None


class TargetKind(_Part, frozen=True):
    """What KEDA found the target to be."""

    group: str = ""
    version: str = ""
    kind: str = ""
    resource: str = ""


class Status(_Part, frozen=True):
    """What KEDA says of a ScaledObject."""

    target: TargetKind | None = msgspec.field(default=None, name="scaleTargetGVKR")


class ScaledObject(_Part, frozen=True):
    """keda.sh/v1alpha1 ScaledObject."""

    metadata: Metadata
    spec: Spec = Spec()
    status: Status = Status()

    @property
    def key(self) -> tuple[str, str]:
        return self.metadata.namespace, self.metadata.name

    @property
    def max_replicas(self) -> int:
        return _DEFAULT_MAX_REPLICAS if self.spec.max_replica_count is None else self.spec.max_replica_count

    @property
    def first_replicas(self) -> int:
        """What KEDA scales to from zero."""
        return max(self.spec.min_replica_count or 0, 1)

    @property
    def target_name(self) -> str:
        """What is scaled, in a message: its kind and its name."""
        return f"{self.target.kind if self.target else 'target'} {self.spec.scale_target_ref.name}"

    @property
    def target(self) -> Resource | None:
        """What is scaled; None: KEDA has not said under which name the API has it, and it is none that everybody knows."""
        if kind := self.status.target:
            return Resource(f"{kind.group}/{kind.version}" if kind.group else kind.version, kind.kind, kind.resource)
        ref = self.spec.scale_target_ref
        plural = _KNOWN_TARGETS.get((ref.api_version or "apps/v1", ref.kind or "Deployment"))
        return Resource("apps/v1", ref.kind or "Deployment", plural) if plural else None

    @property
    def trigger(self) -> Trigger | None:
        """The trigger that scales by our numbers; None: there is none, or it is not as it must be (KEDA's own calls say how)."""
        found = self._ours
        return found[1] if found else None

    @property
    def paused(self) -> str:
        """Why nobody at all may raise the number of replicas; empty: nothing speaks against it."""
        annotations = self.metadata.annotations
        if _PAUSED_REPLICAS in annotations or annotations.get(_PAUSED, "false") not in _FALSE:
            return "it is paused"
        if annotations.get(_PAUSED_SCALE_OUT, "false") not in _FALSE:
            return "its scale-out is paused"
        return ""

    @property
    def reserved(self) -> str:
        """Why nobody but the HPA may raise the number of replicas above the first; empty: nothing speaks against it."""
        if self.paused:
            return self.paused
        advanced = self.spec.advanced or Advanced()
        config = advanced.horizontal_pod_autoscaler_config or HpaConfig()
        if config.behavior and config.behavior.scale_up:
            return "it says itself how fast it may grow (behavior.scaleUp)"
        if advanced.scaling_modifiers:
            return "it scales by a formula (scalingModifiers)"
        if (found := self._ours) and found[0].metric_type not in ("", "AverageValue"):
            return f"its metric is of the type {found[0].metric_type}"
        return ""

    @property
    def _ours(self) -> tuple[TriggerSpec, Trigger] | None:
        for each in self.spec.triggers:
            if each.type in TRIGGER_TYPES and "model" in each.metadata:
                with contextlib.suppress(BadTrigger):
                    return each, parse_trigger({key: value for key, value in each.metadata.items() if not key.endswith(FROM_ENV)})
        return None
