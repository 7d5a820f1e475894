"""How likely an idle time is to end, given how long it has lasted.

Idle times of models reach from seconds to weeks, so they are counted in logarithmic bins: how many ended in each, and how many seconds were
spent there, those of idle times that still last among them (else models that are never asked for would count for nothing). One by the
other is the hazard, the number of ends to be expected a second. A model has few idle times of its own, so what they say is shrunk towards
what those of all models say, as if each bin had seen so many ends more at the hazard of all.
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
OWN_WEIGHT = 3.0  # ends in a bin, of all models, that count as much as those of the model itself
_WIDTH = UPPER - LOWER
# What is believed before anything was seen: in each bin one idle time has ended, at a hazard that falls as idle times get longer.
_FIRST_SECONDS = np.append(UPPER[:-1], 3 * UPPER[-2])


def bins_of(idle: Floats) -> npt.NDArray[np.intp]:
    """The bin in which each of these idle times stands. idle: seconds, not below 0."""
    return np.searchsorted(UPPER, idle, side="right")


def seconds_in_bins(idle: Floats) -> Floats:
    """Of each idle time, in seconds, those that it has spent in each bin: as many rows, BINS columns."""
    return np.clip(idle[:, None] - LOWER, 0.0, _WIDTH)


def hazards(ended: Floats, seconds: Floats) -> Floats:
    """The hazard of each model in each bin, in ends a second: above 0. ended, seconds: what each model has seen of each bin."""
    pooled = (ended.sum(axis=0) + 1.0) / (seconds.sum(axis=0) + _FIRST_SECONDS)
    own: Floats = (ended + OWN_WEIGHT) / (seconds + OWN_WEIGHT / pooled)
    return own


def expected_ends(hazards: Floats, idle: Floats, within: float) -> Floats:
    """How many ends each model's hazards add up to over the next `within` seconds. idle: seconds that each has been idle."""
    spent = np.clip((idle + within)[:, None] - LOWER, 0.0, _WIDTH) - seconds_in_bins(idle)
    ends: Floats = np.einsum("ij,ij->i", hazards, spent)
    return ends
