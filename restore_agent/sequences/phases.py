"""Where the time of one sequence went, by name, with what no phase accounts for shown as such."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from zerowake_shared.phases import Phase


class Phases:
    """The stop-watch of one sequence, running from the moment that it is made; in seconds."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._seconds: dict[Phase, float] = {}
        self._spans: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begin)

    def add(self, name: Phase, seconds: float, begin: float | None = None, ended_before: float = 0.0) -> None:
        """It has ended now, or so many seconds before, and took `seconds` of its own since `begin` (monotonic; default: so long before)."""
        ends = self.total - ended_before
        begins = max(0.0, ends - seconds if begin is None else begin - self._begin)
        first, last = self._spans.get(name, (begins, ends))
        self._spans[name] = min(first, begins), max(last, ends)
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self, name: Phase) -> float:
        return self._seconds.get(name, 0.0)

    @property
    def total(self) -> float:
        return time.monotonic() - self._begin

    def done(self) -> list[tuple[str, float]]:
        """The phases in the order they began; the last is `unaccounted`."""
        rest = self.total - sum(self._seconds.values())
        return [*self._seconds.items(), (Phase.UNACCOUNTED, max(0.0, rest))]

    def spans(self) -> Mapping[str, tuple[float, float]]:
        """When each phase began first and ended last, in seconds since the beginning; others may have been done in between.

        `unaccounted` lasts from the beginning to now.
        """
        return {**self._spans, Phase.UNACCOUNTED: (0.0, self.total)}
