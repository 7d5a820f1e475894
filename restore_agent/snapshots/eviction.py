"""Which snapshots leave a rung for another one: those that cost the fewest seconds for each byte that they free.

What is evicted has to be brought back from the rung below when it is wanted next. That costs seconds, as often as it is wanted; so what
one costs is its seconds times its uses (uses.py), and what it is worth is that for each of its bytes. As few go as are needed, and none
where all together would not be enough: then somebody is told, and has lost nothing.

What several share is free once all of them are gone. Each counts with its part of it, and what is really freed is counted as they are
chosen: so two that have all their pages in common go together, and neither goes alone where its end would free nothing.

What nobody waits for takes the place of what is worth less than half of it. Without that, two snapshots that one has room for would take
each other's place for ever, since whoever plans wants both, and what was measured differs each time. Who waits takes the place of any.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

_CLEARLY = 2.0  # by so much is it worth more than what goes for it


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot on the rung. size: bytes that are free once it is gone. seconds: what it takes to bring it back. uses: of late, an older
    one counting less. held: somebody uses it, so it stays."""

    digest: str
    size: int
    seconds: float
    uses: float
    held: bool = False

    @property
    def worth(self) -> float:
        """Seconds lost for each byte that its end frees."""
        return self.seconds * self.uses / self.size if self.size else math.inf


def evicted(
    candidates: Iterable[Candidate], needed: int, below: float = math.inf, shared: Mapping[frozenset[str], int] = MappingProxyType({})
) -> list[str] | None:
    """Digests of those that go so that `needed` bytes (more than none) become free; of equal worth, those that are named first. None: those
    that may go would not free as much. `below`: only what is worth less than half of that may go; infinite: any. `shared`: bytes that are
    free once all who have them are gone, by their digests.
    """
    freed = _Freed(candidates, shared)
    going: list[Candidate] = []
    for each in sorted(freed.fairly(), key=lambda each: each.worth):
        if freed.bytes >= needed:
            break
        if not each.held and each.size and (each.worth * _CLEARLY < below or below == math.inf):
            going.append(each)
            freed.take(each.digest)
    if freed.bytes < needed:
        return None
    for each in reversed(list(going)):  # a large one may have made smaller ones before it needless, or one that shares what stays
        freed.put_back(each.digest)
        if freed.bytes >= needed:
            going.remove(each)
        else:
            freed.take(each.digest)
    return [each.digest for each in going]


class _Freed:
    """The bytes that become free by the end of several: their own, and what they share, where all who have it are among them."""

    def __init__(self, candidates: Iterable[Candidate], shared: Mapping[frozenset[str], int]) -> None:
        self.bytes = 0
        self._candidates = {each.digest: each for each in candidates}
        stay = {digest for digest, each in self._candidates.items() if each.held}
        self._shared = {owners: size for owners, size in shared.items() if owners.isdisjoint(stay) and owners <= self._candidates.keys()}
        self._left = {owners: len(owners) for owners in self._shared}
        self._of: defaultdict[str, list[frozenset[str]]] = defaultdict(list)
        for owners in self._shared:
            for digest in owners:
                self._of[digest].append(owners)

    def fairly(self) -> Iterator[Candidate]:
        """Each with its part of what it shares: so all who have the same are worth as much as if there were one of them for each part."""
        for digest, each in self._candidates.items():
            part = sum(math.ceil(self._shared[owners] / len(owners)) for owners in self._of[digest])
            yield replace(each, size=each.size + part)

    def take(self, digest: str) -> None:
        self.bytes += self._candidates[digest].size
        for owners in self._of[digest]:
            self._left[owners] -= 1
            if not self._left[owners]:
                self.bytes += self._shared[owners]

    def put_back(self, digest: str) -> None:
        self.bytes -= self._candidates[digest].size
        for owners in self._of[digest]:
            if not self._left[owners]:
                self.bytes -= self._shared[owners]
            self._left[owners] += 1
