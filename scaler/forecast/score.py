"""What a forecast was worth: what it said was likely, beside what happened and beside what a plain rate would have said.

Judged by the log loss, in nats: the logarithm of what it had said of that which then happened, with its sign turned. It is the one measure
that nobody betters by saying anything but what they believe. A hit or a miss needs a bound on top: what is at least as likely is foretold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scaler.forecast.table import Bools, Floats

FORETOLD = 0.1
_MOST_CREDIT, _MOST_DEBT = 15.0, 5.0  # nats
_LEAST = 1e-9  # a chance nearer to 0 or 1 counts as this near: no single surprise outweighs everything


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over judged statements, each of one model and one minute.

    requests: of how many models a request came; expected: how many the forecast had expected. loss, baseline_loss: nats in all, of the
    forecast and of each model's mean rate. hits, misses: requests that were foretold, and that were not; false_alarms: those foretold
    that did not come.
    """

    statements: int = 0
    requests: int = 0
    expected: float = 0.0
    loss: float = 0.0
    baseline_loss: float = 0.0
    hits: int = 0
    misses: int = 0
    false_alarms: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def mean_loss(self) -> float:
        """Nats a statement; 0 before the first."""
        return self.loss / self.statements if self.statements else 0.0

    @property
    def mean_baseline_loss(self) -> float:
        return self.baseline_loss / self.statements if self.statements else 0.0


def losses(chances: Floats, came: Bools) -> Floats:
    """The log loss of each statement, in nats. chances: of a request; came: whether there was one."""
    nats: Floats = -np.log(np.clip(np.where(came, chances, 1.0 - chances), _LEAST, 1.0))
    return nats


def judged(chances: Floats, came: Bools, loss: Floats, baseline_loss: Floats) -> Score:
    """What one minute adds to the score."""
    foretold = chances >= FORETOLD
    return Score(
        statements=len(came),
        requests=int(came.sum()),
        expected=float(chances.sum()),
        loss=float(loss.sum()),
        baseline_loss=float(baseline_loss.sum()),
        hits=int((foretold & came).sum()),
        misses=int((came & ~foretold).sum()),
        false_alarms=int((foretold & ~came).sum()),
    )


def within_bounds(credit: npt.ArrayLike) -> Any:
    """A sum of differences of losses, in nats, kept where it can be lost again soon: e to the fifteenth is proof enough."""
    return np.clip(credit, -_MOST_DEBT, _MOST_CREDIT)
