"""How much of this node's memory staged images may take, and which of them go where another one is wanted.

An image counts from the moment at which it is let in, not only once it has come: two that are staged at the same time would else both find
the memory free that one of them takes. What may be taken is the less of two: of the budget, what others leave of it; of the machine, what
is available to programs, less what is still to come. Nothing is awaited between the look and the decision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from restore_agent.drivers.meminfo import available_memory, total_memory
from restore_agent.errors import AgentError, ErrorKind
from restore_agent.sequences.parked_budget import Share
from restore_agent.sequences.staged import Staged
from restore_agent.snapshots.eviction import Candidate, evicted
from restore_agent.snapshots.pins import REMEDY

SPARE_BYTES = 256 << 20  # of the node's memory that staging never takes
_GIVING_SECONDS = 5.0  # after a piece was given to another agent, which asks for the next
_NAMED = 3  # images that an error names


class NoMemory(AgentError):
    """The node has not enough free memory to stage or restore."""

    kind = ErrorKind.EXHAUSTED
    reason = "no-memory"


class GaveWay(AgentError):
    """An image was on its way into memory, and a request needed the room for another one."""

    kind = ErrorKind.EXHAUSTED
    reason = "no-memory"


def all_of_it(total: int) -> int:
    """What images may take unless something else is said: whatever is available."""
    return total


class MemoryBudget:
    """Of one node."""

    def __init__(
        self,
        share: Share,
        seconds: Callable[[Staged], float],
        uses: Callable[[str], float],
        needed: Callable[[str], bool],
        pinned: Callable[[str], bool],
    ) -> None:
        """`share`: of the node's memory. `seconds`: that an image takes to come back. By its digest, a snapshot's `uses` of late, and
        whether its image is `needed` by something else on the node, or `pinned` there by its owner."""
        self._share = share
        self._seconds = seconds
        self._uses = uses
        self._needed = needed
        self._pinned = pinned
        self._taken: set[Staged] = set()

    @property
    def taken_bytes(self) -> int:
        """Of images that are there, on their way, or used by somebody still."""
        return sum(each.size for each in self._taken)

    @property
    def limit_bytes(self) -> int:
        """What images may take at most."""
        return self._share(total_memory())

    def let_in(self, wanted: Staged) -> list[Staged]:
        """Counts an image until it is `freed`, and returns those that have to go for it, which are counted until they are freed, too.

        Raises NoMemory: nothing has changed.
        """
        budget = self.limit_bytes - self.taken_bytes
        machine = available_memory() - SPARE_BYTES - sum(each.bytes_to_come for each in self._taken)
        needed = wanted.size - min(budget, machine)
        going: list[Staged] = []
        if needed > 0:
            there = {each.snapshot.digest: each for each in self._taken if not each.dropped}
            of_any = wanted.turn.is_urgent or self._pinned(wanted.snapshot.digest)
            below = math.inf if of_any else self._candidate(wanted, wanted).worth
            chosen = evicted((self._candidate(each, wanted) for each in there.values()), needed, below)
            if chosen is None:
                raise NoMemory(self._why(wanted, budget, machine))
            going = [there[digest] for digest in chosen]
        self._taken.add(wanted)
        return going

    def freed(self, staged: Staged) -> None:
        """Nothing of it is in memory any more. Twice does nothing."""
        self._taken.discard(staged)

    def _candidate(self, each: Staged, wanted: Staged) -> Candidate:
        digest = each.snapshot.digest
        gives_way = each.is_coming and wanted.turn.is_urgent and not each.turn.is_urgent  # whoever waits for it is no request
        held = (self._is_used(each) and not gives_way) or self._needed(digest) or self._pinned(digest)
        return Candidate(digest, each.size, self._seconds(each), self._uses(digest), held)

    def _is_used(self, each: Staged) -> bool:
        return each.users > 0 or each.is_coming or time.monotonic() - each.given < _GIVING_SECONDS

    def _why(self, wanted: Staged, budget: int, machine: int) -> str:
        why = f"snapshot {wanted.snapshot} needs {wanted.size >> 20} MiB to stand in memory"
        pinned = [each for each in self._taken if self._pinned(each.snapshot.digest)]
        for_pins = sum(each.size for each in pinned)
        if pinned and for_pins + wanted.size > self.limit_bytes:
            of = f"of the {self.limit_bytes >> 20} MiB that staged images may take (--memory), {for_pins >> 20} MiB are pinned"
            return f"{why}, and {of}: {self._told(pinned)}: {REMEDY}, or give staged images more memory"
        left = max(0, min(budget, machine))
        why += f"; {left >> 20} MiB are {'of what staged images may take (--memory)' if budget <= machine else 'free'}"
        if self._taken:
            why += f", and what stands there is used{', pinned' if pinned else ''} or worth as much: {self._told(self._taken)}"
        also = f", {REMEDY}" if pinned else ""
        return f"{why}: unstage another, end replicas{also}, or give staged images more memory"

    def _told(self, images: Iterable[Staged]) -> str:
        largest = sorted(images, key=lambda each: (-each.size, str(each.snapshot)))
        named = [f"{each.snapshot} with {each.size >> 20} MiB{self._stays(each)}" for each in largest[:_NAMED]]
        return ", ".join(named) + (f" and {len(largest) - _NAMED} more" if len(largest) > _NAMED else "")

    def _stays(self, each: Staged) -> str:
        if self._pinned(each.snapshot.digest):
            return " (pinned)"
        return " (used)" if self._is_used(each) else ""
