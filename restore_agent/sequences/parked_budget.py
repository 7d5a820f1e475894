"""How much of each GPU parked engines may hold: memory that serves nobody now, for a wake that takes next to no time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

from restore_agent.errors import AgentError, ErrorKind

Share = Callable[[int], int]  # all bytes of a memory or a disk → those that may be held of it


def a_tenth(total: int) -> int:
    """What they may hold unless something else is said."""
    return total // 10


class ParkedFull(AgentError):
    """Parked engines hold as much of the GPUs as they may; nothing was begun."""

    kind = ErrorKind.EXHAUSTED
    reason = "parked-full"


class ParkedBudget:
    """The budget of one node. Without a GPU there is nothing to count, and everything has room."""

    def __init__(self, share: Share, totals: Callable[[], Mapping[str, int]], held: Callable[[], Mapping[str, int]]) -> None:
        """`totals`, `held`: UUID of each GPU → all of its bytes, and those that parked engines hold now."""
        self._share = share
        self._totals = totals
        self._held = held
        self._coming: dict[str, int] = {}  # that are being parked
        self._others: frozenset[str] = frozenset()

    def left(self) -> dict[str, int]:
        """UUID of each GPU → bytes that may still be parked there."""
        held = self._held()
        return {
            gpu: 0 if gpu in self._others else max(0, self._share(total) - held.get(gpu, 0) - self._coming.get(gpu, 0))
            for gpu, total in self._totals().items()
        }

    def others_have(self, gpus: Collection[str]) -> None:
        """From now on nothing is parked on these GPUs, and on these alone."""
        self._others = frozenset(gpus)

    def check(self, sizes: Collection[int]) -> None:
        """Whether as much could be parked on some GPU each. Raises ParkedFull."""
        if left := sorted(self.left().values(), reverse=True):
            for number, size in enumerate(sorted(sizes, reverse=True)):
                if size > (most := left[number] if number < len(left) else 0):
                    raise _full(size, most)

    def check_there(self, needed: Mapping[str, int]) -> None:
        """Whether as much could be parked on each of just these GPUs. Raises ParkedFull."""
        left = self.left()
        for gpu, size in needed.items():
            if size > left.get(gpu, 0):
                raise _full(size, left.get(gpu, 0))

    @contextlib.contextmanager
    def counted(self, needed: Mapping[str, int]) -> Iterator[None]:
        """Counts these bytes of each GPU as held until the block ends: several are parked at once."""
        for gpu, size in needed.items():
            self._coming[gpu] = self._coming.get(gpu, 0) + size
        try:
            yield
        finally:
            for gpu, size in needed.items():
                self._coming[gpu] -= size


def _full(size: int, left: int) -> ParkedFull:
    return ParkedFull(
        f"a parked engine of it holds {size >> 20} MiB of a GPU, and parked engines may hold {left >> 20} MiB more at most: give the agent "
        "more with --parked-bytes, or end what else is parked"
    )
