"""The embedded autoscaler and KEDA's service in one process, in virtual time: every wish at its moment, by the rules' own seconds."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from zerowake_proto import externalscaler_pb2_grpc

from scaler.books.hpa import ScalingRules
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.trigger import BadTrigger
from scaler.keda.external_scaler import ExternalScaler
from scaler.local.autoscaler import Autoscaler
from tests.worlds.in_process import InProcessChannel
from tests.worlds.instant_deployment import InstantDeployment
from tests.worlds.virtual_time import LoopClock

CHAT = {"model": "chat", "targetPending": "8"}


class World:
    """One model's demand, and a deployment whose wishes are kept with their moments."""

    def __init__(self, replicas: int) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        self.ledger = Ledger({"chat": ModelLimits()})
        self.chat = InstantDeployment(self.ledger, "chat", replicas)
        self.wishes: list[tuple[float, int]] = []

    def replicas(self) -> int:
        return self.chat.replicas()

    async def scale(self, replicas: int) -> None:
        self.wishes.append((self.clock.now(), replicas))
        await self.chat.scale(replicas)

    def hold(self, count: int) -> None:
        for _ in range(count):
            self.ledger.hold("chat", 1)

    def leave(self, count: int) -> None:
        for _ in range(count):
            self.ledger.leave("chat", 1)

    async def at(self, moment: float) -> None:
        await asyncio.sleep(moment - self.clock.now())


@asynccontextmanager
async def autoscaling(rules: ScalingRules, replicas: int = 0, kind: type[ExternalScaler] = ExternalScaler) -> AsyncIterator[World]:
    world = World(replicas)
    scaler = kind(world.ledger, clock=world.clock, chance=random.Random(1))
    channel = InProcessChannel(scaler, externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server)
    async with Autoscaler(channel, world.clock) as autoscaler:  # type: ignore[arg-type]
        autoscaler.add("chat", CHAT, rules, world)
        yield world
        scaler.close()


async def test_one_request_activates_one_replica_long_before_a_poll() -> None:
    async with autoscaling(ScalingRules(max_replicas=8)) as world:
        await world.at(10)
        world.hold(1)
        await world.at(60)
    assert world.wishes == [(10, 1)]


async def test_a_backlog_gets_all_its_replicas_at_once() -> None:
    """More than the policies' 4 in 15 s."""
    async with autoscaling(ScalingRules(max_replicas=16)) as world:
        await world.at(10)
        world.hold(64)
        await world.at(60)
    assert world.wishes == [(10, 1), (10, 8)]


async def test_the_rest_of_a_burst_that_comes_after_the_activation_is_seen_soon() -> None:
    async with autoscaling(ScalingRules(max_replicas=4)) as world:
        await world.at(10)
        world.hold(1)
        await world.at(10.03)  # the sync that follows the activation at once has seen one request only
        world.hold(63)
        await world.at(60)
    assert world.wishes == [(10, 1), (10.05, 4)]


async def test_demand_above_zero_is_limited_by_the_policies() -> None:
    """4 replicas or 100 % in 15 s. Syncs follow the push at once, after 0.05 s, and then ever later: 12.75 and 25.55 s after it, too."""
    async with autoscaling(ScalingRules(max_replicas=100), replicas=1) as world:
        await world.at(10)
        world.hold(800)
        await world.at(40)
    assert world.wishes == [(10, 5), (35.55, 10)]


class Mute(ExternalScaler):
    """Its pushes are lost."""

    async def StreamIsActive(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield


async def test_activates_by_polling_when_no_push_arrives() -> None:
    async with autoscaling(ScalingRules(), kind=Mute) as world:
        await world.at(10)
        world.hold(1)
        await world.at(100)
    assert world.wishes == [(30, 1)]


async def test_goes_to_zero_after_the_cooldown_and_comes_back() -> None:
    async with autoscaling(ScalingRules(max_replicas=4)) as world:
        for begin in (10, 1010):
            await world.at(begin)
            world.hold(1)
            await world.at(begin + 35)  # a poll finds it, 20 s after the push
            world.leave(1)
        await world.at(2000)
    # More than 300 s after the last poll that found it, at a poll.
    assert world.wishes == [(10, 1), (360, 0), (1010, 1), (1350, 0)]


async def test_falls_to_the_minimum_and_stays_there() -> None:
    rules = ScalingRules(min_replicas=2, max_replicas=6, cooldown_seconds=0, stabilisation_seconds=310)
    async with autoscaling(rules) as world:
        await world.at(10)
        world.hold(48)
        await world.at(100)
        world.leave(48)
        await world.at(1000)
    # The last sync that found them was at 95.55 s; from then on they are 15 s apart.
    assert world.wishes == [(0, 2), (10, 6), (410.55, 2)]


async def test_idle_replicas() -> None:
    async with autoscaling(ScalingRules(min_replicas=2, max_replicas=6, idle_replicas=0)) as world:
        await world.at(10)
        world.hold(1)
        await world.at(20)
        world.leave(1)
        await world.at(1000)
    assert world.wishes == [(10, 2), (330, 0)]


async def test_a_wish_that_was_not_taken_is_made_again() -> None:
    async with autoscaling(ScalingRules()) as world:
        world.chat.broken = True
        await world.at(10)
        world.hold(1)
        await world.at(17)
        world.chat.broken = False
        await world.at(60)
    assert world.wishes == [(10, 1), (13, 1), (16, 1), (19, 1)]


async def test_bad_metadata_is_refused_when_added() -> None:
    async with Autoscaler(InProcessChannel(None, lambda servicer, server: None)) as autoscaler:  # type: ignore[arg-type]
        with pytest.raises(BadTrigger, match="'replicas'"):
            autoscaler.add("chat", {"model": "chat", "replicas": "3"}, ScalingRules(), World(0))
