"""Work beside a block: its end is seen, and the block's end is its own."""

from __future__ import annotations

import asyncio
import logging

import pytest

from zerowake_shared.background import beside, told


class Broken(Exception):
    pass


async def fails(at: asyncio.Event) -> None:
    await at.wait()
    raise Broken("of the work")


async def test_work_that_fails_ends_the_block() -> None:
    at, cancelled = asyncio.Event(), False
    with pytest.raises(Broken, match="of the work"):
        async with beside(fails(at), "work"):
            at.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled = True
                raise
    assert cancelled
    await asyncio.sleep(0)  # nothing of the cancellation is left to whoever goes on


async def test_the_end_of_the_block_ends_the_work() -> None:
    async with beside(asyncio.Event().wait(), "work") as task:  # type: ignore[arg-type]
        await asyncio.sleep(0)
    assert task.cancelled()


async def test_an_error_of_the_block_is_raised_as_it_is() -> None:
    with pytest.raises(Broken, match="of the block") as raised:
        async with beside(fails(asyncio.Event()), "work") as task:
            raise Broken("of the block")
    assert task.cancelled() and type(raised.value) is Broken


async def test_a_cancellation_from_outside_goes_through() -> None:
    async def whole() -> None:
        async with beside(fails(asyncio.Event()), "work"):
            await asyncio.Event().wait()

    task = asyncio.create_task(whole())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_one_of_many_is_logged_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    at = asyncio.Event()
    task, cancelled = asyncio.create_task(fails(at), name="pod a/b"), asyncio.create_task(fails(at))
    for each in (task, cancelled):
        told(each, logging.getLogger("zerowake.agent"))
    cancelled.cancel()
    at.set()
    await asyncio.wait([task, cancelled])
    await asyncio.sleep(0)
    (line,) = caplog.records
    assert line.getMessage() == "pod a/b: ended by a bug: of the work" and line.exc_info
