"""Whether Kubernetes would put a model's pod on a node, by what both say: cordon, taints, labels. Pure.

The rules are those of the scheduler's filters NodeUnschedulable, TaintToleration and NodeAffinity. How much room is left is not asked: that
is the estimate's. Where nothing is known of a node, or of the pods, nothing speaks against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

ZONE = "topology.kubernetes.io/zone"
_UNSCHEDULABLE = "node.kubernetes.io/unschedulable"
_KEEPS_PODS_OUT = ("NoSchedule", "NoExecute")


@dataclass(frozen=True, slots=True)
class Taint:
    """One of a node. effect: NoSchedule, NoExecute or PreferNoSchedule."""

    key: str
    value: str = ""
    effect: str = "NoSchedule"

    def __str__(self) -> str:
        return f"{self.key}{'=' if self.value else ''}{self.value}:{self.effect}"


@dataclass(frozen=True, slots=True)
class Toleration:
    """One of a pod. Empty: any key (with Exists), any effect."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""

    def tolerates(self, taint: Taint) -> bool:
        if self.effect not in ("", taint.effect):
            return False
        if self.operator == "Exists":
            return self.key in ("", taint.key)
        return self.operator in ("", "Equal") and (self.key, self.value) == (taint.key, taint.value)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a node's label has to be. operator: In, NotIn, Exists, DoesNotExist, Gt or Lt."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        has = labels.get(self.key)
        if self.operator in ("Gt", "Lt"):
            try:
                found, bound = int(has or ""), int(self.values[0])
            except (ValueError, IndexError):
                return False
            return found > bound if self.operator == "Gt" else found < bound
        of_text = {"In": has in self.values, "NotIn": has not in self.values, "Exists": has is not None, "DoesNotExist": has is None}
        return of_text.get(self.operator, False)


@dataclass(frozen=True, slots=True)
class Term:
    """One of a required affinity's, of which any is enough: all of labels' and fields' requirements. One without any holds for no node."""

    labels: tuple[Requirement, ...] = ()
    fields: tuple[Requirement, ...] = ()

    def holds(self, name: str, labels: Mapping[str, str]) -> bool:
        if not self.labels and not self.fields:
            return False
        of_fields = {"metadata.name": name}
        return all(each.holds(labels) for each in self.labels) and all(each.holds(of_fields) for each in self.fields)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a cluster says of one of its nodes."""

    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    cordoned: bool = False

    @property
    def zone(self) -> str:
        """The one that it is in; empty: none is named."""
        return self.labels.get(ZONE, "")


@dataclass(frozen=True, slots=True)
class PodDemands:
    """What a model's pods ask of a node. terms: of the required affinity; None: there is none. resources: the extended ones that they ask
    for: a taint of such a name keeps others out, and clusters have these pods tolerate it (ExtendedResourceToleration).
    """

    tolerations: tuple[Toleration, ...] = ()
    selector: Mapping[str, str] = field(default_factory=dict)
    terms: tuple[Term, ...] | None = None
    resources: frozenset[str] = frozenset()

    def tolerates(self, taint: Taint) -> bool:
        return taint.key in self.resources or any(each.tolerates(taint) for each in self.tolerations)


def why_no_pod(name: str, standing: Standing | None, pods: PodDemands | None) -> str:
    """Why none of these pods is put on the node of that name; empty: nothing is known that speaks against it.

    standing: None: no cluster says anything of it. pods: None: what they ask for is not known, and a cordon alone counts.
    """
    if standing is None:
        return ""
    if standing.cordoned and not (pods and pods.tolerates(Taint(_UNSCHEDULABLE))):
        return "it is cordoned"
    return next(_objections(name, standing, pods), "") if pods is not None else ""


def _objections(name: str, standing: Standing, pods: PodDemands) -> Iterator[str]:
    for taint in standing.taints:
        # The cordon's own taint says no more than the cordon, and goes a moment later.
        if taint.key != _UNSCHEDULABLE and taint.effect in _KEEPS_PODS_OUT and not pods.tolerates(taint):
            yield f"its pods do not tolerate the taint {taint}"
    for key, value in pods.selector.items():
        if standing.labels.get(key) != value:
            yield f"its pods select nodes by the label {key}={value}"
    if pods.terms is not None and not any(term.holds(name, standing.labels) for term in pods.terms):
        yield "its pods' required node affinity does not match it"
