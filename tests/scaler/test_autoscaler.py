"""The embedded autoscaler against the real scaler over a unix socket, with a target whose replicas are ready at once."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from scaler.books.hpa import ScalingRules
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.trigger import BadTrigger
from scaler.keda.external_scaler import serve_external_scaler
from scaler.local.autoscaler import Autoscaler, dial

CHAT = {"model": "chat", "targetPending": "8"}


class Deployment:
    """Does at once what it is asked, and tells the ledger of its replicas as the gateway would; `wishes` is what it was asked."""

    def __init__(self, ledger: Ledger, model: str, replicas: int = 0) -> None:
        self.wishes: list[int] = []
        self.broken = False
        self._ledger, self._model = ledger, model
        self._replicas = 0
        self._changed = asyncio.Event()
        self.become(replicas)

    def become(self, replicas: int) -> None:
        self._replicas = replicas
        self._ledger.set_replicas(self._model, ready=replicas, replicas=replicas)
        self._changed.set()

    def replicas(self) -> int:
        return self._replicas

    async def scale(self, replicas: int) -> None:
        self.wishes.append(replicas)
        self._changed.set()
        if self.broken:
            raise RuntimeError("no room on any node")
        self.become(replicas)

    async def until(self, replicas: int) -> None:
        async with asyncio.timeout(10):
            while self._replicas != replicas:
                self._changed.clear()
                await self._changed.wait()

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.wishes) < times:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({"chat": ModelLimits()})


@asynccontextmanager
async def autoscaling(
    ledger: Ledger, deployment: Deployment, tmp_path: Path, rules: ScalingRules, repeat_seconds: float = 60
) -> AsyncIterator[Autoscaler]:
    address = f"unix:{tmp_path}/scaler.sock"
    async with (
        serve_external_scaler(ledger, address=address, repeat_seconds=repeat_seconds),
        dial(address) as channel,
        Autoscaler(channel) as autoscaler,
    ):
        autoscaler.add("chat", CHAT, rules, deployment)
        yield autoscaler


async def test_one_request_activates_one_replica_long_before_a_poll(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    async with autoscaling(ledger, chat, tmp_path, ScalingRules(max_replicas=8)):
        ledger.hold("chat", 1)
        await chat.until(1)  # waits 10 s at most, and polls are 30 s apart
        assert chat.wishes == [1]


async def test_a_backlog_gets_all_its_replicas_at_once(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    async with autoscaling(ledger, chat, tmp_path, ScalingRules(max_replicas=16)):
        for _ in range(64):
            ledger.hold("chat", 1)
        await chat.until(8)  # more than the policies' 4 in 15 s
        assert chat.wishes == [1, 8]


async def test_the_rest_of_a_burst_that_comes_after_the_activation_is_seen_soon(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    async with autoscaling(ledger, chat, tmp_path, ScalingRules(max_replicas=4)):
        ledger.hold("chat", 1)
        await chat.until(1)
        await asyncio.sleep(0.03)  # the sync that follows the activation at once has seen one request only
        for _ in range(63):
            ledger.hold("chat", 1)
        await chat.until(4)
        assert chat.wishes == [1, 4]


async def test_demand_above_zero_is_limited_by_the_policies(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat", replicas=1)
    async with autoscaling(ledger, chat, tmp_path, ScalingRules(max_replicas=100)):
        for _ in range(800):
            ledger.hold("chat", 1)
        await chat.until(5)
        await asyncio.sleep(0.4)  # time for the syncs after 50, 150 and 350 ms
        assert chat.wishes == [5]


async def test_activates_by_polling_when_no_push_arrives(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    async with autoscaling(ledger, chat, tmp_path, ScalingRules(polling_seconds=0.05)):
        ledger.set_replicas("chat", ready=1, replicas=1)  # known to the ledger alone: it has nothing to push
        ledger.start("chat")
        await chat.until(1)
        chat.become(0)
        await chat.until(1)


async def test_goes_to_zero_after_the_cooldown_and_comes_back(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    rules = ScalingRules(max_replicas=4, cooldown_seconds=0.4, polling_seconds=0.05)
    async with autoscaling(ledger, chat, tmp_path, rules):
        for _ in range(2):
            ledger.hold("chat", 1)
            await chat.until(1)
            ledger.leave("chat", 1)
            idle = time.monotonic()
            await chat.until(0)
            assert time.monotonic() - idle > 0.3
        assert chat.wishes == [1, 0, 1, 0]


async def test_falls_to_the_minimum_and_stays_there(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    rules = ScalingRules(min_replicas=2, max_replicas=6, polling_seconds=0.05, cooldown_seconds=0, stabilisation_seconds=0)
    async with autoscaling(ledger, chat, tmp_path, rules):
        await chat.until(2)
        for _ in range(48):
            ledger.hold("chat", 1)
        await chat.until(6)
        for _ in range(48):
            ledger.leave("chat", 1)
        await chat.until(2)
    assert 0 not in chat.wishes


async def test_idle_replicas(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    rules = ScalingRules(min_replicas=2, max_replicas=6, idle_replicas=0, polling_seconds=0.05, cooldown_seconds=0.1)
    async with autoscaling(ledger, chat, tmp_path, rules):
        ledger.hold("chat", 1)
        await chat.until(2)
        ledger.leave("chat", 1)
        await chat.until(0)
    assert chat.wishes == [2, 0]


async def test_a_wish_that_was_not_taken_is_made_again(ledger: Ledger, tmp_path: Path) -> None:
    chat = Deployment(ledger, "chat")
    chat.broken = True
    async with autoscaling(ledger, chat, tmp_path, ScalingRules(), repeat_seconds=0.05):
        ledger.hold("chat", 1)
        await chat.until_asked(3)
        chat.broken = False
        await chat.until(1)


async def test_a_scaler_that_is_gone_takes_nothing_away_and_is_found_again(
    ledger: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"unix:{tmp_path}/scaler.sock"
    chat = Deployment(ledger, "chat", replicas=3)
    rules = ScalingRules(max_replicas=4, cooldown_seconds=0.1, polling_seconds=0.05)
    async with AsyncExitStack() as stack:
        autoscaler = await stack.enter_async_context(Autoscaler(await stack.enter_async_context(dial(address))))
        autoscaler.add("chat", CHAT, rules, chat)
        async with asyncio.timeout(10):
            while "cannot be asked" not in caplog.text:
                await asyncio.sleep(0.01)
        await asyncio.sleep(3 * rules.cooldown_seconds)  # well over the cooldown: what is shown is that nothing happens
        assert chat.wishes == []
        async with serve_external_scaler(ledger, address=address):
            await chat.until(0)
        async with serve_external_scaler(ledger, address=address):
            ledger.hold("chat", 1)
            await chat.until(1)


async def test_bad_metadata_is_refused_when_added(ledger: Ledger, tmp_path: Path) -> None:
    async with dial(f"unix:{tmp_path}/scaler.sock") as channel, Autoscaler(channel) as autoscaler:
        with pytest.raises(BadTrigger, match="'replicas'"):
            autoscaler.add("chat", {"model": "chat", "replicas": "3"}, ScalingRules(), Deployment(ledger, "chat"))
