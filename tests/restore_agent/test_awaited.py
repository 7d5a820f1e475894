"""What waits for a snapshot that is on its way: until it is here, or until a cold start is the sooner one. Time is virtual."""

from __future__ import annotations

import asyncio

from restore_agent.sequences.awaited import Coming, awaited
from restore_agent.snapshots.manifest import Manifest
from restore_agent.transfer.progress import Progress
from tests.worlds.virtual_time import LoopClock, run

TOTAL = 100


def outcome(*came: int, cold: float, failed: str = "", gone: bool = False) -> tuple[str, float]:
    """Why a fetch is not waited for, or empty, and after how many seconds; of a snapshot whose cold start takes `cold` and its restore one.

    came: so many of a hundred bytes are there after each second; all of them: it is here. failed: why it ends after the last of them.
    """

    async def watched() -> tuple[str, float]:
        loop, coming = asyncio.get_running_loop(), Coming("d")
        heard: list[object] = []
        tell, look = coming.begun(loop.time(), heard.append, heard.append)
        about = Manifest.model_construct(cold_seconds=cold)
        look(about)
        tell(Progress(0, 0, TOTAL))
        assert heard == [about, Progress(0, 0, TOTAL)], "who asked for it hears, too"
        for second, size in enumerate(came, 1):
            loop.call_later(second, tell, Progress(size, size, TOTAL))
        if failed or came[-1:] == (TOTAL,):
            loop.call_later(len(came), coming.ended.set_result, failed)
        left: asyncio.Future[None] = loop.create_future()
        if gone:
            loop.call_later(1, left.set_result, None)
        why = await awaited(coming, lambda manifest: 1.0, left, LoopClock(loop))
        return why, loop.time()

    return run(watched())


def test_it_is_waited_for_as_long_as_that_is_sooner() -> None:
    assert outcome(25, 50, 75, 100, cold=10) == ("", 4)


def test_it_is_not_waited_for_where_a_cold_start_is_sooner() -> None:
    why, seconds = outcome(*range(2, 102, 2), cold=10)
    assert (why, seconds) == (
        "it is on its way to this node, and would be here in 48.0 s at its rate so far: a cold start takes 10.0 s",
        2,
    )


def test_no_fetch_is_waited_for_where_a_restore_alone_takes_longer() -> None:
    why, seconds = outcome(100, cold=0.5)
    assert "a cold start takes 0.5 s" in why and seconds == 0


def test_one_that_falls_behind_is_left() -> None:
    """It was to come in seven seconds, and nothing comes any more: by its average the rest takes longer than a cold start at the ninth."""
    why, seconds = outcome(15, 30, 45, cold=12)
    assert "a cold start takes 12.0 s" in why and seconds == 9


def test_nobody_waits_longer_than_a_cold_start_takes() -> None:
    """At each look it is nearly here."""
    why, seconds = outcome(80, 90, 95, 97, 98, 99, 99, 99, 99, cold=8)
    assert "has been waited for 8.0 s" in why and seconds == 8


def test_nothing_comes() -> None:
    why, seconds = outcome(cold=60)
    assert "nothing comes" in why and seconds == 2


def test_its_fetch_fails() -> None:
    assert outcome(20, 40, cold=10, failed="agent 10.0.0.2: it ended") == ("it was on its way to this node: agent 10.0.0.2: it ended", 2)


def test_whoever_it_was_for_has_gone() -> None:
    assert outcome(20, 40, cold=10, gone=True) == ("whoever it was for has gone", 1)


def test_nobody_knows_what_a_cold_start_takes() -> None:
    why, seconds = outcome(20, 40, cold=0)
    assert "nobody knows whether a cold start takes longer" in why and seconds == 0


def test_no_source_says_what_it_is() -> None:
    async def watched() -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        return await awaited(Coming("d"), lambda manifest: 1.0, loop.create_future(), LoopClock(loop)), loop.time()

    why, seconds = run(watched())
    assert "no source has said yet what it is" in why and seconds == 2
