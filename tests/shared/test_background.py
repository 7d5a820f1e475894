"""Work beside a block: its end is seen, and the block's end is its own."""

from __future__ import annotations

import asyncio
import logging

import pytest

from zerowake_shared.background import beside, ended, first_error, kept, to_its_end, told


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


async def test_what_is_kept_is_begun_again_after_a_bug_and_ends_when_it_returns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zerowake_shared.background._FIRST_PAUSE", 0.01)
    tries = 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Broken(f"try {tries}")

    await kept(work, "following pods", logging.getLogger("test"))
    assert tries == 3
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["following pods: ended by a bug"] * 2
    assert "Broken: try 2" in caplog.text


async def test_what_is_kept_is_begun_again_where_what_it_waits_for_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By somebody else: a call of gRPC's ends so when its channel is closed."""
    monkeypatch.setattr("zerowake_shared.background._FIRST_PAUSE", 0.01)
    tries = 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise asyncio.CancelledError

    await kept(work, "orphans", logging.getLogger("test"))
    assert tries == 2


async def test_what_is_kept_and_fails_as_it_is_cancelled_is_not_begun_again(caplog: pytest.LogCaptureFixture) -> None:
    begun = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("can't start new thread")

    task = asyncio.create_task(kept(work, "forecast", logging.getLogger()))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await ended([task])
    assert task.cancelled()
    assert begun == 1
    assert "forecast: ended by a bug as it was cancelled" in caplog.text


async def test_tasks_are_waited_for_and_their_errors_kept_to_themselves() -> None:
    done = []

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            done.append("slow")

    failing = asyncio.create_task(fails(at := asyncio.Event()))
    slow = asyncio.create_task(slow_to_end())
    at.set()
    await asyncio.sleep(0)
    running = {failing, slow}
    slow.add_done_callback(running.discard)  # as owners do, so that the set changes while it is gone through
    await ended(running)
    assert done == ["slow"] and slow.cancelled() and running == {failing}


async def test_a_cancelled_wait_ends_with_the_work() -> None:
    work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(to_its_end(work))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    work.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_what_work_gives_is_given_on() -> None:
    async def work() -> int:
        return 7

    assert await to_its_end(work()) == 7


async def test_of_the_errors_of_a_group_the_first_is_raised_with_its_cause() -> None:
    async def broken() -> None:
        raise Broken("the first") from ValueError("its cause")

    async def late() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("as it was cancelled") from None

    with pytest.raises(Broken, match="the first") as failed, first_error():
        async with asyncio.TaskGroup() as group:
            group.create_task(late())
            await asyncio.sleep(0)
            group.create_task(broken())
    assert str(failed.value.__cause__) == "its cause"
