"""The reserve for the next restore: held in this process's own memory, free within a moment when a restore begins, held again later."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import AsyncIterator
from pathlib import Path

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


async def test_a_process_that_may_have_no_more_memory_goes_on_without(reserve: Headroom, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SIZE // 2, before[1]))
    try:
        reserve.want(SIZE)
        await reserve.taken()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "slower for it: [Errno 12]" in caplog.text
    assert "a bug" not in caplog.text


async def test_it_is_given_where_no_thread_can_be_started(reserve: Headroom, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    held = Held()
    reserve.want(SIZE)
    await reserve.taken()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuses)
        reserve.give()
    await until(lambda: held() < SIZE // 2)
