"""Raising what a ScaledObject scales: for the version that was read, and never down."""

from __future__ import annotations

import pytest

from scaler.kubernetes.scale import Raised, raise_scale
from tests.worlds.scale_target import Target, scaled_object
from zerowake_shared.kubernetes.errors import ClusterError


@pytest.mark.parametrize(("there", "wanted", "writes"), [(0, 3, [3]), (2, 3, [3]), (3, 3, []), (5, 3, []), (0, 0, [])])
async def test_it_only_raises(there: int, wanted: int, writes: list[int]) -> None:
    target = Target(replicas=there)
    asked: list[int] = []

    def want(current: int) -> int:
        asked.append(current)
        return wanted

    assert await raise_scale(target, scaled_object(), want) == Raised(there, max(there, wanted))
    assert (asked, target.writes) == ([there], writes)


async def test_who_wrote_in_between_is_not_overwritten() -> None:
    target = Target()
    target.before_patch = lambda: target.write(7)
    assert await raise_scale(target, scaled_object(), lambda current: current + 1) is None
    assert (target.writes, target.replicas) == ([], 7)


async def test_a_target_that_only_keda_can_find() -> None:
    target = Target()
    engine = {"name": "engine", "apiVersion": "example.com/v1", "kind": "Engine"}
    assert await raise_scale(target, scaled_object(status={}, scaleTargetRef=engine), lambda _: 1) is None
    assert target.looks == 0


async def test_a_cluster_that_cannot_be_asked_says_so() -> None:
    with pytest.raises(ClusterError, match="told to fail"):
        await raise_scale(Target(failing=True), scaled_object(), lambda _: 1)
