"""Work in streams: so many at once and no more, and the first error ends all of it."""

from __future__ import annotations

import asyncio

import pytest

from restore_agent.transfer.streams import Room, in_streams


async def test_all_is_done_in_order_and_no_more_at_once_than_was_said() -> None:
    begun, at_once, most = list[int](), 0, 0

    async def work(item: int, room: Room) -> None:
        nonlocal at_once, most
        begun.append(item)
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1

    await in_streams(range(10), 3, work)
    assert (begun, most) == (list(range(10)), 3)


async def test_the_first_error_is_raised_and_the_others_have_ended() -> None:
    ended = list[int]()

    async def work(item: int, room: Room) -> None:
        if item == 1:
            raise ValueError("the second")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    with pytest.raises(ValueError, match="the second"):
        await in_streams(range(3), 3, work)
    assert sorted(ended) == [0, 2]


def test_memory_is_used_again_and_grows() -> None:
    room = Room()
    room.of(3)[:] = b"abc"
    assert bytes(room.of(2)) == b"ab"
    assert len(room.of(5 << 20)) == 5 << 20
