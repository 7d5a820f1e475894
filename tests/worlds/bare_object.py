"""Objects of Kubernetes' API that are their metadata alone, for tests in which it does not matter what they are."""

from __future__ import annotations

from typing import Any

import msgspec


class Metadata(msgspec.Struct, rename="camel"):
    """What every object has."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}


class Meta(msgspec.Struct):
    """An object as it is read."""

    metadata: Metadata


def pod(name: str, **labels: str) -> dict[str, Any]:
    """As it is made."""
    return {"metadata": {"name": name, "namespace": "tenant", "labels": labels}}
