"""The reserve for the next restore: held in this process's own memory, free within a moment when a restore begins, held again later."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from restore_agent.drivers import headroom
from restore_agent.drivers.headroom import Headroom
from restore_agent.places.processes import resident_bytes
from tests.worlds.waiting import until

SIZE = 64 << 20
pytestmark = pytest.mark.skipif(headroom.available_memory() < 16 * SIZE, reason="needs a gigabyte of memory that is free")


class Held:
    """How much more memory this process has than at the beginning."""

    def __init__(self) -> None:
        self._before = resident_bytes(os.getpid())

    def __call__(self) -> int:
        return resident_bytes(os.getpid()) - self._before


@pytest.fixture
async def reserve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Headroom]:
    monkeypatch.setattr(headroom, "_PAUSE_SECONDS", 0.2)
    reserve = Headroom()
    yield reserve
    await reserve.close()


async def test_what_is_wanted_is_held_with_a_margin(reserve: Headroom) -> None:
    held = Held()
    reserve.want(SIZE)
    await reserve.taken()
    assert SIZE < held() < 2 * SIZE
    reserve.want(SIZE // 4)
    await reserve.taken()
    await until(lambda: held() < SIZE // 2)
    reserve.want(0)
    await until(lambda: held() < SIZE // 8)


async def test_a_restore_has_it_and_it_is_held_again_afterwards(reserve: Headroom) -> None:
    held = Held()
    reserve.want(SIZE)
    await reserve.taken()
    reserve.give()
    await until(lambda: held() < SIZE // 2)
    reserve.give()
    await reserve.taken()
    assert held() > SIZE


async def test_a_restore_that_begins_while_it_is_taken_stops_that(reserve: Headroom) -> None:
    held = Held()
    reserve.want(SIZE)
    reserve.give()
    reserve.want(0)
    await until(lambda: held() < SIZE // 8)


async def test_closed_it_holds_nothing(reserve: Headroom) -> None:
    held = Held()
    reserve.want(SIZE)
    await reserve.taken()
    await reserve.close()
    await until(lambda: held() < SIZE // 8)


async def test_with_nothing_wanted_nothing_is_waited_for(reserve: Headroom) -> None:
    await reserve.taken()
