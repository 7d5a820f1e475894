"""The number of replicas of what a ScaledObject scales: the scale subresource, by which KEDA and the HPA write it as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from scaler.kubernetes.resources import Metadata
from scaler.kubernetes.scaled_object import ScaledObject
from zerowake_shared.kubernetes.errors import Conflict
from zerowake_shared.kubernetes.resource import Resource

T = TypeVar("T")


class Api(Protocol):
    """What is needed of a Cluster (zerowake_shared/kubernetes/cluster.py)."""

    async def get(self, resource: Resource, namespace: str, name: str, kind: type[T], subresource: str = "") -> T: ...

    async def patch(self, resource: Resource, namespace: str, name: str, body: Mapping[str, object], *, subresource: str = "") -> bytes: ...


class _Count(msgspec.Struct, frozen=True):
    replicas: int = 0


class Scale(msgspec.Struct, frozen=True):
    """autoscaling/v1 Scale."""

    metadata: Metadata
    spec: _Count = _Count()


@dataclass(frozen=True, slots=True)
class Raised:
    """The target's replicas, as they were found and as they are wanted now."""

    before: int
    after: int


async def raise_scale(api: Api, found: ScaledObject, wanted: Callable[[int], int]) -> Raised | None:
    """Sets the target to as many replicas as `wanted` says to those that are wanted now; it never lowers them.

    The write counts for the version that was read. None: somebody wrote in between, or nobody but KEDA finds a target of this kind.

    Raises:
        ClusterError: it could not be read or written; NotFound: there is no such target.
    """
    target = found.target
    if target is None:
        return None
    place = (target, found.metadata.namespace, found.spec.scale_target_ref.name)
    scale = await api.get(*place, Scale, "scale")
    before = scale.spec.replicas
    after = max(before, wanted(before))
    if after > before:
        body = {"metadata": {"resourceVersion": scale.metadata.resource_version}, "spec": {"replicas": after}}
        try:
            await api.patch(*place, body, subresource="scale")
        except Conflict:
            return None
    return Raised(before, after)
