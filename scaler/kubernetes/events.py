"""What is needed of a Cluster by whoever tells users of their objects."""

from __future__ import annotations

from typing import Literal, Protocol

from zerowake_shared.kubernetes.resource import Identity, Resource

Kind = Literal["Normal", "Warning"]


class Events(Protocol):
    """Writes events: Cluster does."""

    async def event(self, about: Resource, metadata: Identity, kind: Kind, reason: str, note: str, action: str) -> None: ...
