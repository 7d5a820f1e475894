"""Log losses, hits and misses, against numbers worked out by hand."""

from math import log

import numpy as np
import pytest

from scaler.forecast.score import Score, judged, losses


def test_a_loss_is_the_logarithm_of_what_was_said_of_what_happened() -> None:
    found = losses(np.array([0.5, 0.2, 0.2]), np.array([True, True, False]))
    assert found.tolist() == pytest.approx([-log(0.5), -log(0.2), -log(0.8)])


def test_no_surprise_is_endless() -> None:
    found = losses(np.array([0.0, 1.0, 1.0]), np.array([True, False, True]))
    assert found.tolist() == pytest.approx([-log(1e-9), -log(1e-9), 0.0])


def test_a_minute_is_added_up() -> None:
    came = np.array([True, True, False, False])
    minute = judged(np.array([0.4, 0.05, 0.1, 0.01]), came, np.full(4, 0.25), np.full(4, 0.5))
    assert minute == Score(
        statements=4, requests=2, expected=pytest.approx(0.56), loss=1, baseline_loss=2, hits=1, misses=1, false_alarms=1
    )
    both = minute + minute
    assert (both.statements, both.hits, both.mean_loss, both.mean_baseline_loss) == (8, 2, 0.25, 0.5)


def test_before_the_first_statement_there_is_no_loss() -> None:
    assert (Score().mean_loss, Score().mean_baseline_loss) == (0.0, 0.0)
