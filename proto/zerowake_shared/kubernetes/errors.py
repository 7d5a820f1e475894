"""What Kubernetes' API answers when it does not do what was asked."""

from __future__ import annotations


class ClusterError(Exception):
    """The API server could not be asked, or refused. `status` is HTTP's; 0: there was no answer, or none that could be read."""

    def __init__(self, status: int, what: str, why: str) -> None:
        self.status = status
        super().__init__(f"{what}: {why}" + (f" (HTTP {status})" if status else ""))


class NotFound(ClusterError):
    """There is no such object, or no such kind of objects."""


class Conflict(ClusterError):
    """The object has changed since it was read, or its name is taken."""


class Expired(Exception):
    """The version to go on from is too old: list again."""
