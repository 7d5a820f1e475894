"""More replicas ahead of the HPA: when KEDA has activated, as many as the backlog is worth, and never against the owner's rules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from scaler.books.hpa import SYNC_SECONDS
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.kubernetes.scaled_object import ScaledObject
from scaler.kubernetes.surge import Surge
from tests.worlds.scale_target import PUSH, Target, scaled_object


@asynccontextmanager
async def surging(*objects: ScaledObject) -> AsyncIterator[tuple[Ledger, Target]]:
    ledger, target = Ledger({"m": ModelLimits()}), Target()
    surge = Surge(ledger, target, lambda model: objects if model == "m" else ())
    try:
        yield ledger, target
    finally:
        await surge.close()


def hold(ledger: Ledger, count: int) -> None:
    for _ in range(count):
        ledger.hold("m", 0)


async def test_a_backlog_is_worth_its_replicas_at_once() -> None:
    async with surging(scaled_object()) as (ledger, target):
        hold(ledger, 32)
        await asyncio.sleep(0.1)
        assert target.writes == []  # KEDA decides whether it is activated at all
        target.write(1)
        await target.until(4)
        hold(ledger, 60)
        await target.until(10)  # maxReplicaCount
        assert target.writes == [4, 10]


async def test_a_burst_that_comes_after_its_first_request() -> None:
    async with surging(scaled_object()) as (ledger, target):
        hold(ledger, 1)
        target.write(1)
        for _ in range(31):
            await asyncio.sleep(0.001)
            hold(ledger, 1)
        await target.until(4)


async def test_requests_at_other_gateways_count() -> None:
    async with surging(scaled_object()) as (ledger, target):
        target.write(1)
        hold(ledger, 1)
        ledger.add_remote("m", 23, 0)
        await target.until(3)


async def test_an_activation_soon_after_another() -> None:
    async with surging(scaled_object()) as (ledger, target):
        for _ in range(3):
            hold(ledger, 32)
            await asyncio.sleep(0.6 * SYNC_SECONDS)  # the time that the one before had left is not enough
            target.write(1)
            await target.until(4)
            for _ in range(32):
                ledger.leave("m", 0)
            target.write(0)


async def test_one_request_is_left_to_keda() -> None:
    async with surging(scaled_object()) as (ledger, target):
        target.write(1)
        hold(ledger, 8)
        await asyncio.sleep(0.2)
        assert (target.writes, target.looks) == ([], 0)


async def test_nothing_is_lowered() -> None:
    async with surging(scaled_object()) as (ledger, target):
        target.write(7)
        hold(ledger, 32)
        await asyncio.sleep(0.2)
        assert (target.writes, target.replicas) == ([], 7)


async def test_a_late_write_of_kedas_is_made_up_for() -> None:
    """KEDA looks in its cache, where the target may still be at zero, and writes 1."""
    async with surging(scaled_object()) as (ledger, target):
        hold(ledger, 32)
        target.write(1)
        await target.until(4)
        target.write(1)
        await target.until(4)


async def test_what_the_hpa_lowers_later_stays_lowered() -> None:
    async with surging(scaled_object()) as (ledger, target):
        hold(ledger, 32)
        target.write(1)
        await target.until(4)
        for _ in range(30):
            ledger.leave("m", 0)
        target.write(1)
        await asyncio.sleep(2 * SYNC_SECONDS)
        assert target.replicas == 1


async def test_somebody_writes_in_between() -> None:
    async with surging(scaled_object()) as (ledger, target):
        target.write(1)

        def other() -> None:
            target.before_patch = None
            target.write(2)

        target.before_patch = other
        hold(ledger, 32)
        await target.until(4)
        assert target.writes == [4]


async def test_a_cluster_that_cannot_be_asked_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    async with surging(scaled_object()) as (ledger, target):
        target.write(1)
        target.failing = True
        hold(ledger, 32)
        await asyncio.sleep(0.1)
        target.failing = False
        await target.until(4)
        assert "default/m cannot be scaled ahead of the HPA: GET scale: told to fail" in caplog.text


async def test_a_model_that_is_withdrawn_meanwhile() -> None:
    async with surging(scaled_object()) as (ledger, target):
        hold(ledger, 32)
        ledger.withdraw("m")
        target.write(1)
        await asyncio.sleep(0.1)
        assert target.writes == []


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": {"annotations": {"autoscaling.keda.sh/paused": "true"}}},
        {"metadata": {"annotations": {"autoscaling.keda.sh/paused": "yes"}}},
        {"metadata": {"annotations": {"autoscaling.keda.sh/paused-replicas": "1"}}},
        {"metadata": {"annotations": {"autoscaling.keda.sh/paused-scale-out": "1"}}},
        {"advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleUp": {"stabilizationWindowSeconds": 60}}}}},
        {"advanced": {"scalingModifiers": {"formula": "a + b", "target": "2"}}},
        {"triggers": [PUSH | {"metricType": "Value"}]},
        {"triggers": [{"type": "cron", "metadata": {"start": "0 * * * *"}}]},
        {"triggers": [{"type": "external-push", "metadata": {"scalerAddress": "x:1", "modelFromEnv": "MODEL"}}]},
    ],
    ids=["paused", "paused, not a boolean", "paused at a number", "scale-out paused", "behavior", "formula", "value", "other", "from env"],
)
async def test_left_to_the_hpa(changes: dict[str, Any]) -> None:
    async with surging(scaled_object(**changes)) as (ledger, target):
        target.write(1)
        hold(ledger, 32)
        await asyncio.sleep(0.15)
        assert (target.writes, target.looks) == ([], 0)


def test_what_speaks_for_it() -> None:
    found = scaled_object(
        metadata={"annotations": {"autoscaling.keda.sh/paused": "false"}},
        maxReplicaCount=None,
        advanced={"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}}}},
        triggers=[{"type": "cron", "metadata": {}}, PUSH],
    )
    assert found.trigger and (found.trigger.model, found.trigger.target_pending) == ("m", 8)
    assert (found.reserved, found.max_replicas) == ("", 100)
