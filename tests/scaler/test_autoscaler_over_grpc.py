"""The embedded autoscaler and the real scaler, over a unix socket: what test_autoscaler.py leaves out."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from scaler.books.hpa import ScalingRules
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.keda.external_scaler import serve_external_scaler
from scaler.local.autoscaler import Autoscaler, dial
from tests.worlds.instant_deployment import InstantDeployment

CHAT = {"model": "chat", "targetPending": "8"}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({"chat": ModelLimits()})


async def test_a_backlog_gets_its_replicas_and_loses_them(ledger: Ledger, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/scaler.sock"
    chat = InstantDeployment(ledger, "chat")
    async with serve_external_scaler(ledger, address=address), dial(address) as channel, Autoscaler(channel) as autoscaler:
        rules = ScalingRules(max_replicas=16, cooldown_seconds=0.2, polling_seconds=0.05)
        autoscaler.add("chat", CHAT, rules, chat)
        for _ in range(64):
            ledger.hold("chat", 1)
        await chat.until(8)
        for _ in range(64):
            ledger.leave("chat", 1)
        await chat.until(0)
    assert chat.wishes == [1, 8, 0]


async def test_a_scaler_that_is_gone_takes_nothing_away_and_is_found_again(
    ledger: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"unix:{tmp_path}/scaler.sock"
    chat = InstantDeployment(ledger, "chat", replicas=3)
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
