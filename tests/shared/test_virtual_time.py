"""The loop of virtual time, which other tests trust."""

import asyncio

import pytest

from tests.worlds.virtual_time import LoopClock, run


def test_timers_fire_in_order_and_exactly() -> None:
    async def work() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        clock = LoopClock(loop, wall=1000.0)
        seen: list[tuple[str, float]] = []

        async def after(seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((f"{seconds:g}", clock.now()))

        async with asyncio.timeout(3 * 86400), asyncio.TaskGroup() as group:
            for seconds in (86400.0, 0.3, 0.1, 40 * 60.0):
                group.create_task(after(seconds))
        await asyncio.sleep(0.1)
        seen.append(("wall", clock.wall()))
        return seen

    assert run(work()) == [("0.1", 0.1), ("0.3", 0.3), ("2400", 2400.0), ("86400", 86400.0), ("wall", 87400.1)]


def test_a_deadline_passes() -> None:
    async def work() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7.5):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(work()) == 7.5


def test_waiting_for_nothing_is_an_error_and_no_hang() -> None:
    with pytest.raises(RuntimeError, match=r"nothing can happen any more, 2 s after the beginning"):
        run(_forever())


async def _forever() -> None:
    await asyncio.sleep(2)
    await asyncio.Event().wait()
