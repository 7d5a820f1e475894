"""Whether what KEDA asks for is a ScaledObject at all. Its calls say a namespace and a name, and are the same for a ScaledJob.

A ScaledJob makes a Job for each request that waits. No request ever goes to one, since a replica is what stays, so it would make Jobs for
ever. KEDA shows the error that it is answered with as an event of the object that its user made.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from scaler.kubernetes.resources import SCALED_OBJECTS, Meta
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.kubernetes.errors import ClusterError, NotFound
from zerowake_shared.kubernetes.resource import Resource

T = TypeVar("T")
_AGAIN_SECONDS = 10.0  # until the API server is asked again: KEDA asks every second or so


class Api(Protocol):
    """What is needed of a Cluster."""

    async def get(self, resource: Resource, namespace: str, name: str, kind: type[T], subresource: str = "") -> T: ...


class Objects(Protocol):
    """What is needed of an informer of ScaledObjects."""

    def get(self, namespace: str, name: str) -> object | None: ...


class ScaledJobs:
    """Tells them from ScaledObjects: those that are followed are; for another name the API server is asked, since the list may be old."""

    def __init__(self, api: Api, objects: Objects, clock: Clock = SYSTEM_CLOCK) -> None:
        self._api = api
        self._objects = objects
        self._clock = clock
        self._absent: dict[tuple[str, str], float] = {}  # until when

    async def why_not(self, namespace: str, name: str) -> str:
        """Why this is not scaled; empty: it is a ScaledObject, or cannot be told from one now."""
        if self._objects.get(namespace, name) is not None:
            return ""
        now = self._clock.now()
        self._absent = {key: until for key, until in self._absent.items() if until > now}
        if (namespace, name) not in self._absent:
            try:
                await self._api.get(SCALED_OBJECTS, namespace, name, Meta)
            except NotFound:
                self._absent[namespace, name] = now + _AGAIN_SECONDS
            except ClusterError:
                return ""
            else:
                return ""
        return (
            f"there is no ScaledObject {namespace}/{name}: if that is a ScaledJob, no request would ever reach its Jobs; "
            "scale a Deployment with a ScaledObject"
        )
