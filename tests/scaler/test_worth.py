"""What a byte is worth."""

from __future__ import annotations

import numpy as np
import pytest

from scaler.plan.worth import Objective, worth


@pytest.mark.parametrize(
    ("objective", "expected"),
    [(Objective(), [0.1, 0.05]), (Objective(hits=0, mean=1), [0.2, 0.5]), (Objective(hits=1, mean=1, tail=1), [0.7, 5.55])],
)
def test_chance_times_gain_for_each_byte(objective: Objective, expected: list[float]) -> None:
    found = worth(np.array([1.0, 1.0]), np.array([2.0, 10.0]), np.array([10.0, 20.0]), objective)
    assert found == pytest.approx(expected)
