"""What a byte of memory is worth: chance × gain ÷ bytes, of many models at once.

    chance    of a request, of each model: requests expected a second, or the chance of one within a time; one and the same kind for all
    gain      what it is good for that the bytes stand there already, as the objective has it: one hit, so many seconds saved, and their
              square, which is what the tail is made of
    bytes     what they take

Kept is what is worth most a byte; who comes displaces who is there only where he is worth so much more (`SWAP`): a swap moves bytes, and
chances are estimates. The best set of whole models in so many bytes would be a knapsack. By worth a byte it is missed by less than one
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SWAP = 1.3  # times what is displaced, for what is fetched ahead of need

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Objective:
    """What counts of a request that finds its bytes: that it does, the seconds that it saves, and their square. Weights, of which not all
    are 0.
    """

    hits: float = 1.0
    mean: float = 0.0
    tail: float = 0.0


# What an owner of nodes can ask for, by name. By seconds alone small models are seldom found, so a hit counts as one second in both.
OBJECTIVES: Mapping[str, Objective] = {
    "mean": Objective(hits=1.0, mean=1.0),  # of the seconds that requests wait
    "p99": Objective(hits=1.0, tail=1.0),  # the longest waits: large models stay rather than small ones that are asked for as often
}


def worth(chance: Floats, saved_seconds: Floats, size_bytes: Floats, objective: Objective) -> Floats:
    """Of each model, for each of its bytes. saved_seconds: against the rung that it would be served from otherwise."""
    gain = objective.hits + objective.mean * saved_seconds + objective.tail * saved_seconds**2
    return chance * gain / size_bytes
