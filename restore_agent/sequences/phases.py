"""Where the time of one sequence went, by name, with what no phase accounts for shown as such."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from zerowake_shared.phases import Phase


class Phases:
    """The stop-watch of one sequence, running from the moment that it is made; in seconds."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._seconds: dict[Phase, float] = {}

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begin)

    def add(self, name: Phase, seconds: float) -> None:
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
