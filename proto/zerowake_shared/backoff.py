"""How long to wait before the next try: longer from failure to failure, short again after a success.

tenacity, backoff and stamina were looked at. They wrap a call that is repeated until it returns. Here the call is mostly a stream that
lives for hours: it has succeeded at its first message, long before it ends, and from then on the next failure is a first one again. Their
state belongs to one run of the call and has no way to say so from within, so the loops stay loops and only the numbers come from here.
"""

from __future__ import annotations

import random

from zerowake_shared.clock import SYSTEM_CHANCE


class Backoff:
    """Waits in seconds, from `first` times `factor` each up to `last`.

    jitter: the share by which a wait may be shorter (0.5: between half of it and all), where many would come back at the same moment.
    chance: where that comes from.
    """

    def __init__(
        self, first: float, last: float, *, factor: float = 2.0, jitter: float = 0.0, chance: random.Random = SYSTEM_CHANCE
    ) -> None:
        self._first = first
        self._last = last
        self._factor = factor
        self._jitter = jitter
        self._chance = chance
        self._next = first
        self.failures = 0  # how often `next` was asked since the last success

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        seconds = self._next
        self._next = min(seconds * self._factor, self._last)
        self.failures += 1
        return seconds * self._chance.uniform(1.0 - self._jitter, 1.0) if self._jitter else seconds

    def reset(self) -> None:
        """There was a success: the next wait is `first` again."""
        self._next = self._first
        self.failures = 0
