"""What a ScaledObject scales: its scale subresource as the API server keeps it, and such a ScaledObject."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from scaler.kubernetes.scaled_object import ScaledObject
from zerowake_shared.kubernetes.errors import ClusterError, Conflict
from zerowake_shared.kubernetes.resource import Resource

PUSH = {"type": "external-push", "metadata": {"scalerAddress": "zerowake-scaler.zerowake:9443", "model": "m", "targetPending": "8"}}


def scaled_object(**changes: Any) -> ScaledObject:
    """As KEDA leaves one behind: spec, metadata and status can be changed."""
    status = {"scaleTargetGVKR": {"group": "apps", "version": "v1", "kind": "Deployment", "resource": "deployments"}}
    status = changes.pop("status", status)
    told = {
        "metadata": {"name": "m", "namespace": "default", **changes.pop("metadata", {})},
        "spec": {"scaleTargetRef": {"name": "engine"}, "maxReplicaCount": 10, "triggers": [PUSH], **changes},
        "status": status,
    }
    return msgspec.convert(told, ScaledObject)


@dataclass
class Target:
    """The scale subresource of one Deployment, as the API server keeps it: a patch counts for the version that was read."""

    replicas: int = 0
    version: int = 1
    writes: list[int] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failing: bool = False
    looks: int = 0
    before_patch: Any = None
    events: list[tuple[str, str]] = field(default_factory=list)

    def write(self, replicas: int) -> None:
        self.replicas = replicas
        self.version += 1
        self.changed.set()

    async def get(self, resource: Resource, namespace: str, name: str, kind: Any, subresource: str = "") -> Any:
        self.looks += 1
        assert (resource.path(namespace, name, subresource)) == "/apis/apps/v1/namespaces/default/deployments/engine/scale"
        if self.failing:
            raise ClusterError(500, "GET scale", "told to fail")
        return msgspec.convert({"metadata": {"resourceVersion": str(self.version)}, "spec": {"replicas": self.replicas}}, kind)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any], *, subresource: str = "") -> bytes:
        assert (namespace, name, subresource) == ("default", "engine", "scale")
        if self.before_patch:
            self.before_patch()
        if body["metadata"]["resourceVersion"] != str(self.version):
            raise Conflict(409, "PATCH scale", "the object has been modified")
        self.writes.append(body["spec"]["replicas"])
        self.write(self.writes[-1])
        return b"{}"

    async def event(self, about: Resource, metadata: Any, kind: str, reason: str, note: str, action: str) -> None:
        self.events.append((metadata.name, reason))

    async def until(self, replicas: int, within: float = 5.0) -> None:
        async with asyncio.timeout(within):
            while self.replicas != replicas:
                self.changed.clear()
                await self.changed.wait()
