"""Objects that declare models, and the informer that brings them, without a cluster."""

from __future__ import annotations

from typing import Any

import msgspec

from scaler.kubernetes.resources import ModelSnapshot
from scaler.kubernetes.scaled_object import ScaledObject


class Informer:
    """What an informer does to whoever listens."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.callback: Any = None

    def on_change(self, callback: Any) -> None:
        self.callback = callback

    def put(self, found: Any) -> None:
        key = "/".join(found.key)
        old = self.objects.get(key)
        self.objects[key] = found
        self.callback(old, found)

    def drop(self, key: str) -> None:
        self.callback(self.objects.pop(key), None)


def declared_snapshot(key: str, born: int, model: str = "m", **spec: Any) -> ModelSnapshot:
    return msgspec.convert({"metadata": _metadata(key, born), "spec": {"model": model, **spec}}, ModelSnapshot)


def declared_object(key: str, born: int, model: str = "m", **metadata: str) -> ScaledObject:
    trigger = {"type": "external-push", "metadata": {"model": model, "scalerAddress": "x:1", **metadata}}
    return msgspec.convert({"metadata": _metadata(key, born), "spec": {"triggers": [trigger]}}, ScaledObject)


def _metadata(key: str, born: int) -> dict[str, str]:
    """born: seconds; who is older has the name."""
    namespace, _, name = key.partition("/")
    return {"namespace": namespace, "name": name, "uid": f"uid of {key}", "creationTimestamp": f"2026-01-01T00:00:{born:02}Z"}
