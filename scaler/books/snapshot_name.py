"""The name by which people and agents speak of a snapshot."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True, slots=True)
class SnapshotName:
    """A snapshot's name in its namespace, whatever its content is at the moment."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, value: str) -> SnapshotName:
        """`NAMESPACE/NAME`, or `NAME` alone for one of the namespace `default`."""
        namespace, _, name = value.rpartition("/")
        return cls(namespace or DEFAULT_NAMESPACE, name)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
