"""Which snapshots leave a rung for another one: those that cost the fewest seconds for each byte that they free.

What is evicted has to be brought back from the rung below when it is wanted next. That costs seconds, as often as it is wanted; so what
one costs is its seconds times its uses (uses.py), and what it is worth is that for each of its bytes. As few go as are needed, and none
where all together would not be enough: then somebody is told, and has lost nothing.

What nobody waits for takes the place of what is worth less than half of it. Without that, two snapshots that one has room for would take
each other's place for ever, since whoever plans wants both, and what was measured differs each time. Who waits takes the place of any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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


def evicted(candidates: Iterable[Candidate], needed: int, below: float = math.inf) -> list[str] | None:
    """Digests of those that go so that `needed` bytes (more than none) become free; of equal worth, those that are named first. None: those
    that may go would not free as much. `below`: only what is worth less than half of that may go; infinite: any."""
    going: list[Candidate] = []
    left = needed
    for each in sorted(candidates, key=lambda each: each.worth):
        if left <= 0:
            break
        if not each.held and each.size and (each.worth * _CLEARLY < below or below == math.inf):
            going.append(each)
            left -= each.size
    if left > 0:
        return None
    for each in reversed(list(going)):  # a large one may have made smaller ones before it needless
        if left + each.size <= 0:
            going.remove(each)
            left += each.size
    return [each.digest for each in going]
