"""A rate is smoothed over what is measured."""

from __future__ import annotations

from restore_agent.transfer.bandwidth import Bandwidth


def test_a_bandwidth_follows_what_is_measured() -> None:
    rate = Bandwidth()
    assert rate.rate == 0.0
    rate.measured(0, 1.0)
    rate.measured(100, 0.0)
    assert rate.rate == 0.0, "nothing was measured"
    rate.measured(1000, 1.0)
    assert rate.rate == 1000.0, "the first stands for all"
    rate.measured(2000, 1.0)
    assert 1000.0 < rate.rate < 2000.0
