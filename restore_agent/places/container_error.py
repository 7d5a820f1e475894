"""What is said of a container that cannot be what was asked of it."""

from __future__ import annotations

from restore_agent.errors import ErrorKind
from restore_agent.places.place import PlaceError


class ContainerError(PlaceError):
    """A container cannot be restored into, or a program could not be started in it."""


class ContainerRefused(ContainerError):
    """What the pod's template or its engine does cannot be carried, however often it is tried."""

    kind = ErrorKind.INVALID
