"""Requests that wait at zero while KEDA does nothing: the scaler scales by itself, once, and only if its owner would have it so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.kubernetes.first_replica import PATIENCE_SECONDS, FirstReplica
from scaler.kubernetes.scaled_object import ScaledObject
from tests.worlds.scale_target import Target, scaled_object
from tests.worlds.virtual_time import run


@asynccontextmanager
async def waiting(*objects: ScaledObject) -> AsyncIterator[tuple[Ledger, Target]]:
    """A request waits from now on."""
    ledger, target = Ledger({"m": ModelLimits()}), Target()
    first = FirstReplica(ledger, target, lambda model: objects if model == "m" else ())
    ledger.hold("m", 0)
    try:
        yield ledger, target
    finally:
        await first.close()


def test_keda_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with waiting(scaled_object()) as (_, target):
            await asyncio.sleep(PATIENCE_SECONDS - 0.1)
            assert target.looks == 0, "KEDA has its time"
            await asyncio.sleep(0.2)
            assert target.writes == [1]
            await asyncio.sleep(60)
            assert target.writes == [1]
            assert target.events == [("m", "ScaledWithoutKeda")]
            assert "KEDA did not scale Deployment engine from zero: the scaler did" in caplog.text

    run(story())


def test_keda_follows() -> None:
    async def story() -> None:
        async with waiting(scaled_object()) as (_, target):
            target.write(1)
            await asyncio.sleep(600)  # a cold start that takes its time
            assert (target.writes, target.events) == ([], [])

    run(story())


def test_keda_that_never_heard_of_the_object() -> None:
    async def story() -> None:
        async with waiting(scaled_object(status={})) as (_, target):
            await asyncio.sleep(3)
            assert target.writes == [1]

    run(story())


def test_as_many_as_keda_would_begin_with() -> None:
    async def story() -> None:
        async with waiting(scaled_object(minReplicaCount=3, idleReplicaCount=0)) as (_, target):
            await asyncio.sleep(3)
            assert target.writes == [3]

    run(story())


def test_a_cluster_that_cannot_be_asked_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with waiting(scaled_object()) as (_, target):
            target.failing = True
            await asyncio.sleep(120)
            assert "nor can the scaler: GET scale: told to fail" in caplog.text
            target.failing = False
            await asyncio.sleep(10)
            assert target.writes == [1]

    run(story())


def test_who_has_left_needs_no_replica() -> None:
    async def story() -> None:
        async with waiting(scaled_object()) as (ledger, target):
            ledger.leave("m", 0)
            await asyncio.sleep(60)
            assert target.looks == 0
            ledger.hold("m", 0)
            await asyncio.sleep(3)
            assert target.writes == [1]

    run(story())


def test_a_client_that_gives_up_and_asks_again() -> None:
    """Each time before the scaler has lost patience; it has it once."""

    async def story() -> None:
        async with waiting(scaled_object()) as (ledger, target):
            for _ in range(4):
                await asyncio.sleep(0.9)
                ledger.leave("m", 0)
                ledger.hold("m", 0)
            assert target.writes == [1]

    run(story())


def test_somebody_writes_in_between() -> None:
    async def story() -> None:
        async with waiting(scaled_object()) as (_, target):
            target.before_patch = lambda: target.write(2)
            await asyncio.sleep(60)
            assert (target.writes, target.replicas) == ([], 2)

    run(story())


def test_a_model_that_is_withdrawn_meanwhile() -> None:
    async def story() -> None:
        async with waiting(scaled_object()) as (ledger, target):
            ledger.withdraw("m")
            await asyncio.sleep(60)
            assert target.looks == 0

    run(story())


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": {"annotations": {"autoscaling.keda.sh/paused": "true"}}},
        {"metadata": {"annotations": {"autoscaling.keda.sh/paused-replicas": "0"}}},
        {"metadata": {"annotations": {"autoscaling.keda.sh/paused-scale-out": "true"}}},
        {"metadata": {"deletionTimestamp": "2026-11-26T18:00:00Z"}},
        {"maxReplicaCount": 0},
        {"status": {}, "scaleTargetRef": {"name": "engine", "apiVersion": "example.com/v1", "kind": "Engine"}},
    ],
    ids=["paused", "paused at a number", "scale-out paused", "being deleted", "none allowed", "of a kind that only KEDA can find"],
)
def test_left_at_zero(changes: dict[str, Any]) -> None:
    async def story() -> None:
        async with waiting(scaled_object(**changes)) as (_, target):
            await asyncio.sleep(60)
            assert (target.writes, target.looks) == ([], 0)

    run(story())


@pytest.mark.parametrize(
    "changes",
    [
        {"advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleUp": {"stabilizationWindowSeconds": 60}}}}},
        {"advanced": {"scalingModifiers": {"formula": "a + b", "target": "2"}}},
    ],
    ids=["behavior", "formula"],
)
def test_rules_of_the_hpa_are_about_more_than_the_first(changes: dict[str, Any]) -> None:
    async def story() -> None:
        async with waiting(scaled_object(**changes)) as (_, target):
            await asyncio.sleep(3)
            assert target.writes == [1]

    run(story())
