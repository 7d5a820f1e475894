"""How likely an idle time is to end, given how long it has lasted.

Idle times of models reach from seconds to weeks, so they are counted in logarithmic bins: how many ended in each, and how many seconds were
spent there, those of idle times that still last among them (else models that are never asked for would count for nothing). One by the
other is the hazard, the number of ends to be expected a second. A model has few idle times of its own, so what they say is shrunk towards
what those of all models say, as if each bin had seen so many ends more at the hazard of all. What was seen lately is shrunk likewise
towards what was seen ever: models change, and a few dozen idle times of a new kind shall be enough to know it.
Rejected: a rate (a model that was just asked for is far likelier to be asked for again), and a distribution with two or three parameters
(idle times of real models have several humps: within a chat, within a day, over a weekend).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scaler.forecast.table import Floats

UPPER: Floats = np.append(10.0 * 3.0 ** np.arange(11), np.inf)  # seconds: 10, 30, 90, … a week, no end
LOWER: Floats = np.append(0.0, UPPER[:-1])
BINS = len(UPPER)
PRIOR_ENDS = 3.0  # in a bin, that what is known more widely counts for
_REMEMBERED = 20.0  # ends in a bin, of one model: with more of them all that it has seen there counts half
_WIDTH = UPPER - LOWER
# What is believed before anything was seen: in each bin one idle time has ended, at a hazard that falls as idle times get longer.
_FIRST_SECONDS = np.append(UPPER[:-1], 3 * UPPER[-2])


def bins_of(idle: Floats) -> npt.NDArray[np.intp]:
    """The bin in which each of these idle times stands. idle: seconds, not below 0."""
    return np.searchsorted(UPPER, idle, side="right")


def seconds_in_bins(idle: Floats) -> Floats:
    """Of each idle time, in seconds, those that it has spent in each bin: as many rows, BINS columns."""
    return np.clip(idle[:, None] - LOWER, 0.0, _WIDTH)


def forget(ended: Floats, seconds: Floats) -> None:
    """Halves what a model has seen of a bin once that is much: what stays was seen lately, above all."""
    often = ended > _REMEMBERED
    ended[often] *= 0.5
    seconds[often] *= 0.5


def pooled(ended: Floats, seconds: Floats) -> Floats:
    """The hazard of all models together in each bin. ended, seconds: what they have seen, BINS columns."""
    of_all: Floats = (ended.sum(axis=0) + 1.0) / (seconds.sum(axis=0) + _FIRST_SECONDS)
    return of_all


def hazards(of_all: Floats, ended: Floats, seconds: Floats, lately_ended: Floats, lately_seconds: Floats) -> Floats:
    """The hazard of each model, in ends a second: above 0. What each model has seen of a bin, ever and lately; of_all: that of all."""
    ever = (ended + PRIOR_ENDS) / (seconds + PRIOR_ENDS / of_all)
    lately: Floats = (lately_ended + PRIOR_ENDS) / (lately_seconds + PRIOR_ENDS / ever)
    return lately


def expected_ends(hazards: Floats, idle: Floats, within: float) -> Floats:
    """How many ends each model's hazards add up to over the next `within` seconds. idle: seconds that each has been idle."""
    spent = np.clip((idle + within)[:, None] - LOWER, 0.0, _WIDTH) - seconds_in_bins(idle)
    ends: Floats = np.einsum("ij,ij->i", hazards, spent)
    return ends
