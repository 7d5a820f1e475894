"""How KEDA's cooldown sees a model that is used now and then: KEDA's rules and the pushes in one process, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from zerowake_proto import externalscaler_pb2_grpc
from zerowake_proto.externalscaler_pb2_grpc import ExternalScalerStub

from scaler.books.hpa import SYNC_SECONDS, ScalingRules
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.keda.external_scaler import ExternalScaler
from scaler.local.autoscaler import Autoscaler
from tests.worlds.in_process import InProcessChannel
from tests.worlds.instant_deployment import InstantDeployment
from tests.worlds.keda_cooldown import CooledDown
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


async def _cooled(requests: Sequence[tuple[float, float]], **rules: float) -> CooledDown:
    """What KEDA did by a minute after these requests: of each how long after the one before it began, and how long it lasted."""
    clock, ledger = LoopClock(asyncio.get_running_loop()), Ledger({"chat": ModelLimits()})
    scaler = ExternalScaler(ledger, clock=clock, chance=random.Random(1))
    channel = InProcessChannel(scaler, externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server)
    chat = CooledDown(ledger, "chat", clock, **rules)  # type: ignore[arg-type]
    async with chat.by(ExternalScalerStub(channel)), asyncio.TaskGroup() as group:  # type: ignore[no-untyped-call]
        for after, seconds in requests:
            await asyncio.sleep(after)
            group.create_task(chat.request(seconds))
        await asyncio.sleep(60)
        scaler.close()
    return chat


def test_no_look_is_told_that_a_model_is_idle_while_a_push_is_due_that_says_otherwise() -> None:
    """Three looks have seen the request by 12.5; the push for its end comes at 13.1. KEDA's poll at 13 takes nothing away."""
    chat = run(_cooled([(10.1, 0.1)], cooldown=0, polling=1, sync_at=11.5, drain=2))
    assert chat.activations == [(10.1, 1)]
    assert chat.gone == [14.0]


def test_nor_while_keda_takes_a_push_in() -> None:
    """The push for its end comes at 13.1, and KEDA has taken it in at 13.2; its poll is between the two."""
    chat = run(_cooled([(10.1, 0.1)], cooldown=0, polling=1.01, sync_at=100, drain=2, lag=0.1))
    assert chat.activations == [(pytest.approx(10.2), 1)]
    assert chat.gone == [pytest.approx(14.14)]


@pytest.mark.parametrize("seed", range(40))
def test_what_keda_has_taken_away_it_brings_back_for_requests_alone(seed: int) -> None:
    chance = random.Random(seed)
    requests = [(chance.uniform(0.2, 6), chance.uniform(0.01, 1)) for _ in range(30)]
    rules = {"cooldown": chance.choice([0, 0.2, 0.5, 1, 2, 5]), "polling": chance.choice([0.3, 0.5, 1, 2, 5])}
    lags = {"drain": chance.uniform(0.5, 4), "lag": chance.uniform(0, 0.3), "sync_at": chance.uniform(0, SYNC_SECONDS)}
    chat = run(_cooled(requests, **rules, **lags))
    assert [moment for moment, waiting in chat.activations if not waiting] == []
    assert len(chat.gone) == len(chat.activations)
