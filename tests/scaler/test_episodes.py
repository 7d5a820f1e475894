"""Requests become scale-ups by the cooldown alone."""

from __future__ import annotations

import math

import numpy as np

from scaler.simulate.episodes import episodes
from scaler.simulate.trace import Trace


def test_a_gap_longer_than_the_cooldown_is_a_scale_up() -> None:
    at, model = np.array([0.0, 10, 30, 71, 200, 400]), np.array([0, 1, 0, 0, 0, 1])
    found = episodes(Trace(["a", "b"], at, model, np.array([100.0, 0, 0, 0, 0, 0]), 500), 40, 1, 100)
    assert (found.model.tolist(), found.begin.tolist()) == ([0, 1, 0, 1], [0, 10, 200, 400])  # 30 + 1 + 40 is 71: in time
    assert (found.quiet.tolist(), found.end.tolist()) == ([72, 11, 201, 401], [112, 51, 241, 441])
    assert found.next.tolist() == [200, 400, math.inf, math.inf]


def test_a_long_answer_outlasts_those_that_came_after_it() -> None:
    found = episodes(Trace(["a"], np.array([0.0, 5, 160]), np.zeros(3, dtype=np.int64), np.array([10_000.0, 0, 0]), 200), 60, 1, 100)
    assert found.begin.tolist() == [0]  # the first one takes 101 s
    assert found.quiet.tolist() == [161]
