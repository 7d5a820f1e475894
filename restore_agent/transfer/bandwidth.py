"""How fast a step goes, as it was measured."""

from __future__ import annotations

_SMOOTHING = 0.3  # weight of the newest measurement


class Bandwidth:
    """A smoothed rate, bytes a second; 0 until something was measured."""

    def __init__(self) -> None:
        self.rate = 0.0

    def measured(self, size: int, seconds: float) -> None:
        if size and seconds > 0:
            self.rate = size / seconds if not self.rate else self.rate + _SMOOTHING * (size / seconds - self.rate)
