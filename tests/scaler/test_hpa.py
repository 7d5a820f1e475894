"""The formula, the limits and the windows, against numbers worked out from Kubernetes' and KEDA's rules."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.books.hpa import Hpa, ScalingRules, activation, proportional, rise_limit


@pytest.mark.parametrize(
    ("current", "total", "target", "wanted"),
    [
        (1, 8, 8, 1),
        (1, 9, 8, 2),  # 1.125 is beyond the tolerance
        (1, 8.8, 8, 1),  # exactly 10 % over
        (1, 8.801, 8, 2),
        (10, 72, 8, 10),  # exactly 10 % under
        (10, 71, 8, 9),
        (1, 64, 8, 8),
        (4, 0, 8, 0),
        (3, 0.3, 0.1, 3),  # 0.3 / 0.1 is not 3 in binary
        (1, 0.003, 0.001, 3),
    ],
)
def test_average_value(current: int, total: float, target: float, wanted: int) -> None:
    assert proportional(current, total, target) == wanted


@given(st.integers(1, 1000), st.integers(0, 100_000), st.integers(1, 1000))
def test_average_value_leaves_no_replica_over_its_target(current: int, total: int, target: int) -> None:
    wanted = proportional(current, total, target)
    if wanted == current:
        assert total <= 1.1 * target * current + 1e-9
    else:
        assert wanted == math.ceil(total / target)
        assert abs(total / (target * current) - 1) > 0.1


@pytest.mark.parametrize(
    ("current", "added", "removed", "limit"),
    [(1, 0, 0, 5), (4, 0, 0, 8), (5, 0, 0, 10), (5, 4, 0, 5), (9, 4, 0, 10), (3, 0, 2, 10), (20, 10, 0, 20)],
)
def test_rise_limit(current: int, added: int, removed: int, limit: int) -> None:
    assert rise_limit(current, added, removed) == limit


def test_rises_by_the_policies_unless_told_otherwise() -> None:
    rules = ScalingRules(max_replicas=100)
    hpa = Hpa(rules)
    now, current, steps = 0.0, 1, []
    for _ in range(4):
        wish = hpa.desired(current=current, total=800, target=8, now=now)
        hpa.changed(current, wish, now)
        current = wish
        steps.append(current)
        assert hpa.desired(current=current, total=800, target=8, now=now + 14.9) == min(current, 100)
        now += 15.1
    assert steps == [5, 10, 20, 40]
    assert Hpa(rules).desired(current=1, total=800, target=8, now=0, limited=False) == 100


def test_falls_only_when_the_window_is_over() -> None:
    hpa = Hpa(ScalingRules(max_replicas=10, stabilisation_seconds=300))
    assert hpa.desired(current=8, total=64, target=8, now=0) == 8
    assert hpa.desired(current=8, total=8, target=8, now=15) == 8
    assert hpa.desired(current=8, total=24, target=8, now=100) == 8
    assert hpa.desired(current=8, total=8, target=8, now=299) == 8
    assert hpa.desired(current=8, total=8, target=8, now=301) == 3  # the highest of the window is now the 3 of second 100
    assert hpa.desired(current=3, total=8, target=8, now=402) == 1


def test_a_first_sync_never_falls_at_once() -> None:
    assert Hpa(ScalingRules(max_replicas=10)).desired(current=6, total=0, target=8, now=0) == 6
    assert Hpa(ScalingRules(max_replicas=10, stabilisation_seconds=0)).desired(current=6, total=0, target=8, now=0) == 1


def test_is_off_at_zero_and_keeps_the_bounds() -> None:
    hpa = Hpa(ScalingRules(min_replicas=2, max_replicas=4))
    assert hpa.desired(current=0, total=800, target=8, now=0) == 0
    assert hpa.desired(current=1, total=0, target=8, now=0) == 2
    assert hpa.desired(current=9, total=800, target=8, now=0) == 4
    assert hpa.desired(current=4, total=800, target=8, now=0) == 4


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 500)), min_size=1, max_size=40), st.integers(0, 3), st.integers(3, 30))
def test_never_leaves_its_bounds_nor_falls_below_the_demand(samples: list[tuple[float, int]], least: int, most: int) -> None:
    rules = ScalingRules(min_replicas=least, max_replicas=most, stabilisation_seconds=30)
    hpa = Hpa(rules)
    now, current = 0.0, max(least, 1)
    for gap, total in samples:
        now += gap
        wish = hpa.desired(current=current, total=total, target=8, now=now)
        assert max(least, 1) <= wish <= most
        if wish < current:
            assert wish >= min(math.ceil(total / 8), most)
        if wish > current:
            hpa.changed(current, wish, now)
            assert wish <= max(2 * current, current + 4)
        current = wish


ZERO = ScalingRules(max_replicas=5, cooldown_seconds=60)
IDLE = ScalingRules(min_replicas=2, max_replicas=5, idle_replicas=0, cooldown_seconds=60)
KEPT = ScalingRules(min_replicas=2, max_replicas=5, cooldown_seconds=60)


@pytest.mark.parametrize(
    ("rules", "active", "failed", "replicas", "idle_seconds", "wish"),
    [
        (ZERO, True, False, 0, 0, 1),
        (ZERO, True, False, 1, 0, None),
        (ZERO, True, True, 0, 0, 1),
        (ZERO, False, False, 3, 61, 0),
        (ZERO, False, False, 3, 60, None),
        (ZERO, False, True, 3, 999, None),  # a scaler that cannot be asked takes nothing away
        (ZERO, False, False, 0, 999, None),
        (IDLE, True, False, 0, 0, 2),
        (IDLE, True, False, 1, 0, 2),
        (IDLE, False, False, 2, 61, 0),
        (IDLE, False, False, 2, 10, None),
        (KEPT, False, False, 1, 0, 2),
        (KEPT, False, False, 2, 999, None),
        (KEPT, True, False, 0, 0, 2),
    ],
)
def test_activation(rules: ScalingRules, active: bool, failed: bool, replicas: int, idle_seconds: float, wish: int | None) -> None:
    assert activation(rules, active=active, failed=failed, replicas=replicas, idle_seconds=idle_seconds) == wish


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("min_replicas", {"min_replicas": -1}),
        ("max_replicas", {"max_replicas": 0}),
        ("max_replicas", {"min_replicas": 3, "max_replicas": 2}),
        ("idle_replicas", {"idle_replicas": 0}),
        ("idle_replicas", {"idle_replicas": 1, "min_replicas": 2, "max_replicas": 3}),
        ("cooldown_seconds", {"cooldown_seconds": -1}),
        ("polling_seconds", {"polling_seconds": 0}),
        ("stabilisation_seconds", {"stabilisation_seconds": -1}),
    ],
)
def test_impossible_rules_name_the_field(field: str, values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{field} is "):
        ScalingRules(**values)
