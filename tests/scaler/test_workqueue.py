"""The queue's promises: no key in two hands, none missed, failures ever later, and one failing key delays no other."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest

from scaler.kubernetes.workqueue import WorkQueue


async def running(queue: WorkQueue[str], work: Callable[[str], Awaitable[float | None]], seconds: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await queue.run(work)


async def test_a_key_is_in_one_pair_of_hands_and_comes_again_if_it_changed_meanwhile() -> None:
    queue: WorkQueue[str] = WorkQueue()
    hands: Counter[str] = Counter()
    done: list[str] = []

    async def work(key: str) -> None:
        hands[key] += 1
        assert hands[key] == 1
        if done.count(key) == 0:
            for _ in range(5):
                queue.add(key)
        await asyncio.sleep(0.02)
        hands[key] -= 1
        done.append(key)

    for key in ("a", "b", "a", "a"):
        queue.add(key)
    await running(queue, work, 0.3)
    assert Counter(done) == {"a": 2, "b": 2}


async def test_failures_come_again_ever_later_and_delay_no_other() -> None:
    queue: WorkQueue[str] = WorkQueue()
    loop = asyncio.get_running_loop()
    tries: list[float] = []
    fine: list[str] = []

    async def work(key: str) -> None:
        if key == "bad":
            tries.append(loop.time())
            raise RuntimeError("no")
        fine.append(key)

    queue.add("bad")
    for number in range(20):
        queue.add(f"good-{number}")
    await running(queue, work, 2000.0)
    gaps = [round(later - earlier, 6) for earlier, later in pairwise(tries)]
    assert gaps == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 300.0, 300.0, 300.0, 300.0, 300.0]
    assert len(fine) == 20


async def test_the_sooner_of_two_times_counts() -> None:
    queue: WorkQueue[str] = WorkQueue()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    came: list[float] = []

    async def work(key: str) -> float | None:
        came.append(loop.time() - begun)
        return 0.1 if len(came) == 1 else None

    queue.add_after("a", 0.1)
    queue.add_after("a", 60)
    await running(queue, work, 100.0)
    assert came == [0.1, 0.2]
