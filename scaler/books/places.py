"""Whose the places of replicas are: how many requests each gateway may send to each replica at once.

One gateway keeps this book for all (fleet/shared_places.py). A place is one gateway's from when it is granted until that one gives it back,
so that what is granted never passes a replica's concurrency, however many gateways there are and whatever news are under way between them.
A gateway keeps its places between requests: asking for each request would cost a round trip each.

Fair is max-min: whoever waits and has least is next; with as few, whoever was served longer ago. Where nothing is free, those who have more
are asked for some of theirs: *firmly* for whoever has two less, or none at all (the place comes when its request has ended, even if others
wait there), and all who have no line *kindly* (it comes when nobody there has use for it). So an idle gateway keeps nothing that another
waits for, and at a concurrency of 1 gateways take turns.
Pure: no input or output, no clock. Rejected: a fixed share for each gateway (the concurrency is often smaller than their number, and a busy
gateway would hold requests while places of an idle one are free).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Granted:
    """One more place of a replica for a gateway."""

    gateway: str
    model: str
    replica: str


@dataclass(frozen=True, slots=True)
class Recalled:
    """A gateway is asked to give one place back: `firm`, as soon as it is free; else as soon as nobody there has use for it."""

    gateway: str
    model: str
    replica: str
    firm: bool


@dataclass(slots=True)
class _Want:
    """How many more places a gateway has use for, and of which replicas."""

    count: int = 0
    replicas: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Gateway:
    """What one gateway has, is asked for and wants."""

    held: Counter[str] = field(default_factory=Counter)  # by replica
    firmly: Counter[str] = field(default_factory=Counter)
    kindly: Counter[str] = field(default_factory=Counter)
    wants: dict[str, _Want] = field(default_factory=dict)  # by model
    served: int = 0  # the number of the last grant


class PlaceBook:
    """All gateways' places.

    capacity: the places of each replica of a model; None: not known now. withheld: of a replica, given its capacity, how many places are
    not to be granted beside what the book has, and how many of those it must do without even if they are granted already.
    """

    def __init__(
        self, capacity: Callable[[str], int | None], withheld: Callable[[str, int], tuple[int, int]] = lambda replica, places: (0, 0)
    ) -> None:
        self._capacity = capacity
        self._withheld = withheld
        self._gateways: dict[str, _Gateway] = {}
        self._model_of: dict[str, str] = {}  # of replicas
        self._grants = itertools.count(1)

    def gateways(self) -> Set[str]:
        return self._gateways.keys()

    def models(self) -> set[str]:
        """Those of which anything is known."""
        wanted = {model for gateway in self._gateways.values() for model in gateway.wants}
        return wanted | set(self._model_of.values())

    def held(self, gateway: str) -> Mapping[str, int]:
        """By replica."""
        return dict(+self._gateways[gateway].held) if gateway in self._gateways else {}

    def join(self, gateway: str, holds: Iterable[tuple[str, str, int]]) -> None:
        """The gateway says what it has: (model, replica, places). It is right, whatever was thought before."""
        known = self._gateways[gateway] = _Gateway(served=self._gateways[gateway].served if gateway in self._gateways else 0)
        for model, replica, count in holds:
            self._model_of[replica] = model
            known.held[replica] = count

    def leave(self, gateway: str) -> None:
        """The gateway is gone, and its places are free."""
        self._gateways.pop(gateway, None)
        self._forget()

    def want(self, gateway: str, model: str, count: int, replicas: Iterable[str]) -> None:
        """The gateway has use for so many places more, of any of these replicas."""
        known = self._gateways[gateway]
        if count > 0:
            known.wants[model] = _Want(count, frozenset(replicas))
        else:
            known.wants.pop(model, None)

    def give_back(self, gateway: str, replica: str, count: int) -> None:
        known = self._gateways[gateway]
        known.held[replica] = max(0, known.held[replica] - count)
        for asked in (known.firmly, known.kindly):
            asked[replica] = max(0, asked[replica] - count)
        self._forget()

    def settle(self, model: str) -> list[Granted | Recalled]:
        """What is granted and asked back now; it is in the book already."""
        places = self._capacity(model)
        if places is None:
            return []
        said: list[Granted | Recalled] = [*self._overdrawn(model, places)]
        while granted := self._grant(model, places):
            said.append(granted)
        said += self._recall(model)
        return said

    def _grant(self, model: str, places: int) -> Granted | None:
        waiting = [(self._count(each, model), each.served, name) for name, each in self._gateways.items() if model in each.wants]
        for _, _, name in sorted(waiting):
            gateway = self._gateways[name]
            want = gateway.wants[model]
            free = {replica: places - self._taken(replica) - self._withheld(replica, places)[0] for replica in want.replicas}
            if not free or free[replica := max(sorted(free), key=free.__getitem__)] <= 0:
                continue
            self._model_of[replica] = model
            gateway.held[replica] += 1
            gateway.served = next(self._grants)
            want.count -= 1
            if not want.count:
                del gateway.wants[model]
            return Granted(name, model, replica)
        return None

    def _recall(self, model: str) -> Iterable[Recalled]:
        """From those who have, for those who wait. What was asked for firmly and has not come yet is for the first of them."""
        firmly = sum(each.firmly[replica] for each in self._gateways.values() for replica, of in self._model_of.items() if of == model)
        waiting = sorted((self._count(each, model), each.served, name) for name, each in self._gateways.items() if model in each.wants)
        for has, _, name in waiting:
            want = self._gateways[name].wants[model]
            for gets in range(has, has + want.count):
                found = self._most(model, name, want.replicas)
                if found is None or not (found[0] >= gets + 2 or gets == 0):
                    break
                if firmly:
                    firmly -= 1
                    continue
                _, other, replica = found
                self._gateways[other].firmly[replica] += 1
                yield Recalled(other, model, replica, True)
        for _, _, name in waiting:
            want = self._gateways[name].wants[model]
            for other, gateway in self._gateways.items():
                if model not in gateway.wants:
                    yield from self._kindly(model, other, gateway, want)

    def _kindly(self, model: str, name: str, gateway: _Gateway, want: _Want) -> Iterable[Recalled]:
        for replica in sorted(want.replicas):
            while gateway.kindly[replica] < min(want.count, gateway.held[replica]):
                gateway.kindly[replica] += 1
                yield Recalled(name, model, replica, False)

    def _most(self, model: str, name: str, replicas: frozenset[str]) -> tuple[int, str, str] | None:
        """Of the other gateways the one with most places that it is not firmly asked for: how many, who, and a place of which replica."""
        best: tuple[int, str, str] | None = None
        for other, gateway in self._gateways.items():
            left = {replica: gateway.held[replica] - gateway.firmly[replica] for replica in replicas}
            replica = max(sorted(left), key=left.__getitem__, default="")
            if other == name or not replica or left[replica] <= 0:
                continue
            count = self._count(gateway, model) - sum(gateway.firmly[each] for each, of in self._model_of.items() if of == model)
            if best is None or (count, other) > best[:2]:
                best = count, other, replica
        return best

    def _overdrawn(self, model: str, places: int) -> Iterable[Recalled]:
        """More is granted than there may be: the limit was lowered, or a gateway that nothing is heard of has a share."""
        for replica in [replica for replica, of in self._model_of.items() if of == model]:
            over = self._taken(replica) + self._withheld(replica, places)[1] - places
            over -= sum(each.firmly[replica] for each in self._gateways.values())
            for _ in range(over):
                left = {name: each.held[replica] - each.firmly[replica] for name, each in self._gateways.items()}
                name = max(sorted(left), key=left.__getitem__, default="")
                if not name or left[name] <= 0:
                    break
                self._gateways[name].firmly[replica] += 1
                yield Recalled(name, model, replica, True)

    def _taken(self, replica: str) -> int:
        return sum(each.held[replica] for each in self._gateways.values())

    def _count(self, gateway: _Gateway, model: str) -> int:
        return sum(count for replica, count in gateway.held.items() if self._model_of.get(replica) == model)

    def _forget(self) -> None:
        for replica in [each for each in self._model_of if not self._taken(each)]:
            del self._model_of[replica]
            for gateway in self._gateways.values():
                for counts in (gateway.held, gateway.firmly, gateway.kindly):
                    counts.pop(replica, None)
