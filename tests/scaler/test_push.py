"""How KEDA's cooldown sees a model that is used now and then: KEDA's rules and the pushes in one process, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from zerowake_proto import externalscaler_pb2_grpc

from scaler.books.hpa import ScalingRules
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.keda.external_scaler import ExternalScaler
from scaler.local.autoscaler import Autoscaler
from tests.worlds.in_process import InProcessChannel
from tests.worlds.instant_deployment import InstantDeployment
from tests.worlds.virtual_time import LoopClock, run


class World:
    """A model at zero; `gone` are the moments at which KEDA has taken it back there."""

    def __init__(self) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        self.ledger = Ledger({"chat": ModelLimits()})
        self.chat = InstantDeployment(self.ledger, "chat")
        self.gone: list[float] = []

    def replicas(self) -> int:
        return self.chat.replicas()

    async def scale(self, replicas: int) -> None:
        if replicas == 0:
            self.gone.append(self.clock.now())
        await self.chat.scale(replicas)

    async def request(self, seconds: float) -> None:
        """One that waits for a replica if there is none."""
        self.ledger.hold("chat", 1)
        await self.chat.until(1)
        self.ledger.hand_over("chat", 1)
        await asyncio.sleep(seconds)
        self.ledger.end("chat")

    async def at(self, moment: float) -> None:
        await asyncio.sleep(moment - self.clock.now())


@asynccontextmanager
async def scaled(cooldown: float, polling: float) -> AsyncIterator[World]:
    world = World()
    scaler = ExternalScaler(world.ledger, clock=world.clock, chance=random.Random(1))
    channel = InProcessChannel(scaler, externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server)
    async with Autoscaler(channel, world.clock) as autoscaler:  # type: ignore[arg-type]
        autoscaler.add("chat", {"model": "chat"}, ScalingRules(cooldown_seconds=cooldown, polling_seconds=polling), world)
        yield world
        scaler.close()


@pytest.mark.parametrize("polling", [0.7, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("cooldown", [2.0, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("seconds", [0.01, 1.2])
def test_a_request_every_two_seconds_keeps_the_model(cooldown: float, polling: float, seconds: float) -> None:
    async def asked() -> tuple[list[float], float]:
        async with scaled(cooldown, polling) as world:
            await world.at(0.5)
            for number in range(60):
                await world.at(0.5 + 2 * number)
                await world.request(seconds)
            during = list(world.gone)
            ended = world.clock.now()
            await world.at(ended + cooldown + 2 * polling + 4)
            assert len(world.gone) == len(during) + 1, "and without requests it goes"
            return during, world.gone[-1] - ended

    during, idle = run(asked())
    assert during == []
    assert idle >= cooldown


def test_the_cooldown_counts_from_the_end_of_a_request() -> None:
    async def asked() -> None:
        async with scaled(cooldown=5, polling=30) as world:
            await world.at(31)
            await world.request(27)  # until two seconds before a poll
            await world.at(61)
            assert world.gone == []
            await world.at(91)
            assert world.gone == [90]

    run(asked())


def test_somebody_who_left_before_there_was_a_replica_is_not_pushed_for() -> None:
    async def asked() -> None:
        async with scaled(cooldown=2, polling=1) as world:
            world.chat.broken = True
            await world.at(10)
            world.ledger.hold("chat", 1)
            await asyncio.sleep(0.1)
            world.ledger.leave("chat", 1)
            world.chat.broken = False
            wishes = list(world.chat.wishes)
            await world.at(60)
            assert world.chat.wishes == wishes

    run(asked())
