"""How many requests this gateway may send to a replica: all that its concurrency allows, where no other gateway sends any."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol


class Places(Protocol):
    """What the dispatcher asks, and tells, about the places of replicas. With several gateways it is fleet/shared_places.py."""

    def on_room(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)` when there may be a place for a request that is held."""

    def room(self, replica: str, concurrency: int, in_flight: int) -> int:
        """How many requests more may be sent to the replica now, of which this gateway has sent it `in_flight`."""

    def taken(self, replica: str, model: str) -> None:
        """A request goes to the replica."""

    def freed(self, replica: str) -> None:
        """A request has ended there; whoever waits in this gateway was not served yet."""

    def idle(self, replica: str) -> None:
        """Whoever waits was served: what is free there is idle."""

    def dropped(self, replica: str) -> None:
        """The replica takes no more requests of this gateway."""

    def wanted(self, model: str, count: int, replicas: Iterable[str]) -> None:
        """So many requests have no place, and any of these replicas would do. A place may be there when it returns."""


class WholeReplicas:
    """No other gateway sends anything to this one's replicas."""

    def on_room(self, callback: Callable[[str], None]) -> None: ...

    def room(self, replica: str, concurrency: int, in_flight: int) -> int:
        return concurrency - in_flight

    def taken(self, replica: str, model: str) -> None: ...

    def freed(self, replica: str) -> None: ...

    def idle(self, replica: str) -> None: ...

    def dropped(self, replica: str) -> None: ...

    def wanted(self, model: str, count: int, replicas: Iterable[str]) -> None: ...
