"""The number of replicas of what a ScaledObject scales: the scale subresource, by which KEDA and the HPA write it as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import msgspec

from scaler.kubernetes.resources import Metadata
from scaler.kubernetes.scaled_object import ScaledObject
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


async def read_scale(api: Api, found: ScaledObject, target: Resource) -> Scale:
    """Raises: NotFound: there is no such target; ClusterError."""
    return await api.get(target, found.metadata.namespace, found.spec.scale_target_ref.name, Scale, "scale")


async def write_scale(api: Api, found: ScaledObject, target: Resource, read: Scale, replicas: int) -> None:
    """Counts for the version that was read. Raises: Conflict: somebody wrote in between; ClusterError."""
    body = {"metadata": {"resourceVersion": read.metadata.resource_version}, "spec": {"replicas": replicas}}
    await api.patch(target, found.metadata.namespace, found.spec.scale_target_ref.name, body, subresource="scale")
