"""What the cluster says of its nodes, and pods of nodes, as the plan takes it (plan/scheduling.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from scaler.fleet.nodes import Nodes
from scaler.kubernetes.resources import Metadata
from scaler.plan.scheduling import PodDemands, Requirement, Standing, Taint, Term, Toleration
from zerowake_shared.kubernetes.informer import Informer

log = logging.getLogger(__name__)


class NodeSpec(msgspec.Struct, frozen=True, rename="camel"):
    """Who may be on it."""

    unschedulable: bool = False
    taints: tuple[Taint, ...] = ()


class ClusterNode(msgspec.Struct, frozen=True):
    """What is read of a Node."""

    metadata: Metadata
    spec: NodeSpec = NodeSpec()

    @property
    def standing(self) -> Standing:
        return Standing(self.metadata.labels, self.spec.taints, self.spec.unschedulable)


def told_to(nodes: Nodes, informer: Informer[ClusterNode]) -> Informer[ClusterNode]:
    """Has `nodes` know what the informer finds, as long as it runs."""

    def changed(old: ClusterNode | None, new: ClusterNode | None) -> None:
        if found := new or old:
            nodes.place(found.metadata.name, new.standing if new else None)

    informer.on_change(changed)
    return informer


def demands_of(spec: Mapping[str, Any]) -> PodDemands | None:
    """Of a pod's spec. None: it is none that an API server would take, so nothing is known."""
    try:
        return _demands(spec)
    except (msgspec.ValidationError, AttributeError, TypeError) as error:
        log.debug("what a pod asks of nodes cannot be read: %s", error)
        return None


def _demands(spec: Mapping[str, Any]) -> PodDemands:
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    limits = [(each.get("resources") or {}).get("limits") or {} for each in spec.get("containers") or []]
    return PodDemands(
        msgspec.convert(spec.get("tolerations") or [], tuple[Toleration, ...]),
        msgspec.convert(spec.get("nodeSelector") or {}, dict[str, str]),
        None if required is None else tuple(_term(each) for each in required.get("nodeSelectorTerms") or []),
        frozenset(name for each in limits for name in each if "/" in name),
    )


def _term(told: Mapping[str, Any]) -> Term:
    labels, fields = (msgspec.convert(told.get(name) or [], tuple[Requirement, ...]) for name in ("matchExpressions", "matchFields"))
    return Term(labels, fields)
