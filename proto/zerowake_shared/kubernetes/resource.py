"""What kinds of objects there are, and how the API spells what all of them have."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of objects, and where the API has it. api: group and version; the core group has no name."""

    api: str
    kind: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.api}" if "/" in self.api else f"/api/{self.api}"
        parts = (root, *(("namespaces", namespace) if namespace else ()), self.plural, name, subresource)
        return "/".join(part for part in parts if part)


PODS = Resource("v1", "Pod", "pods")
EVENTS = Resource("events.k8s.io/v1", "Event", "events")


class Identity(Protocol):
    """The metadata of an object, as far as it says which object, and which version of it, was read."""

    @property
    def name(self) -> str: ...
    @property
    def namespace(self) -> str: ...
    @property
    def uid(self) -> str: ...
    @property
    def resource_version(self) -> str: ...


def timestamp(wall: float, precision: Literal["seconds", "microseconds"] = "seconds") -> str:
    """A moment, in seconds since 1970, as Kubernetes writes a Time, or a MicroTime."""
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec=precision).replace("+00:00", "Z")
