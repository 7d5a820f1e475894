"""How a program is asked to stop."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from scaler.programs.stopping import stopped_by, unless

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
async def signals() -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    yield stopped_by(*NUMBERS)
    for number in NUMBERS:
        asyncio.get_running_loop().remove_signal_handler(number)


async def test_the_first_signal_stops_and_the_second_does_at_once(signals: tuple[asyncio.Event, asyncio.Event]) -> None:
    stop, at_once = signals
    assert not stop.is_set()
    os.kill(os.getpid(), signal.SIGUSR2)
    await asyncio.wait_for(stop.wait(), 5)
    assert not at_once.is_set()
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.wait_for(at_once.wait(), 5)


async def test_work_that_is_done_before_the_event() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    await unless(asyncio.Event(), asyncio.sleep(0))
    with pytest.raises(ZeroDivisionError):
        await unless(asyncio.Event(), fail())


async def test_work_that_the_event_ends() -> None:
    event, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    working = asyncio.create_task(unless(event, work()))
    await asyncio.sleep(0)
    event.set()
    await asyncio.wait_for(working, 5)
    assert ended.is_set()
