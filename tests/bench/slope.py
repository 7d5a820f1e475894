"""Whether a count grows with time: samples of a long run, and the straight line through them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """What was counted at one moment. minute: since the run began."""

    minute: float
    values: Mapping[str, int]


def rise(samples: Sequence[Sample], name: str) -> float:
    """By how much a minute the line of least squares through the samples' values rises; 0 for fewer than two moments."""
    count = len(samples)
    if count < 2:
        return 0.0
    middle = sum(each.minute for each in samples) / count
    mean = sum(each.values[name] for each in samples) / count
    spread = sum((each.minute - middle) ** 2 for each in samples)
    return sum((each.minute - middle) * (each.values[name] - mean) for each in samples) / spread if spread else 0.0
