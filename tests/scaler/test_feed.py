"""The page's feed: read once for all who listen, bounded whoever is slow, and over when the scaler is."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

import pytest

from scaler.page.feed import LISTENERS, Feed, TooManyListeners
from scaler.view.state import State
from tests.worlds import shown_state


class Shown:
    """A state that a test changes, and how often it was read."""

    def __init__(self) -> None:
        self.state = shown_state.state()
        self.reads = 0

    async def read(self) -> State:
        self.reads += 1
        return self.state

    def hold(self, held: int) -> None:
        """So many requests wait for the first model."""
        first, *others = self.state.models
        self.state = replace(self.state, models=(replace(first, held=held), *others))


async def event(frames: AsyncIterator[bytes]) -> tuple[str, Any]:
    """The next one, by name; comments and pauses are passed over."""
    async for frame in frames:
        if frame and not frame.startswith(b":"):
            name, data = frame.decode().removesuffix("\n\n").split("\n")
            return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))
    raise AssertionError("the stream has ended")


async def held(frames: AsyncIterator[bytes], count: int) -> None:
    """Waits until the first model is told to have so many waiting."""
    while (await event(frames))[1]["set"]["models"]["model-0"]["held"] != count:
        pass


async def test_first_the_whole_and_then_what_changes() -> None:
    shown = Shown()
    feed = Feed(shown.read, interval=0.0)
    async with feed.running(), aclosing(feed.listen()) as frames:
        name, whole = await event(frames)
        assert name == "state" and [each["name"] for each in whole["models"]] == [each.name for each in shown.state.models]
        shown.hold(3)
        assert await event(frames) == (
            "change",
            {"at": shown.state.at, "set": {"models": {"model-0": {"held": 3}}}, "gone": {"models": []}},
        )


async def test_nothing_is_read_while_nobody_listens_and_all_hear_of_one_reading() -> None:
    shown = Shown()
    feed = Feed(shown.read, interval=0.0)
    async with feed.running():
        await asyncio.sleep(0)
        assert shown.reads == 0
        async with aclosing(feed.listen()) as one, aclosing(feed.listen()) as other:
            assert await anext(one) is await anext(other), "it is encoded once"
            shown.hold(5)
            await asyncio.gather(held(one, 5), held(other, 5))
        read = shown.reads
        for _ in range(20):
            await asyncio.sleep(0)
        assert shown.reads <= read + 1, "one look may have begun when they went"


async def test_who_comes_again_is_told_what_is_so_now() -> None:
    shown = Shown()
    feed = Feed(shown.read, interval=0.0)
    async with feed.running():
        async with aclosing(feed.listen()) as frames:
            await event(frames)
        shown.hold(8)
        async with aclosing(feed.listen()) as frames:
            name, whole = await event(frames)
            assert name == "state" and whole["models"][0]["held"] == 8


async def test_one_that_is_slow_is_sent_the_whole_again_and_holds_up_nobody() -> None:
    shown = Shown()
    feed = Feed(shown.read, interval=0.0)
    async with feed.running(), aclosing(feed.listen()) as slow, aclosing(feed.listen()) as quick:
        await event(slow)
        await event(quick)
        for count in range(1, 31):
            shown.hold(count)
            await held(quick, count)
        name, whole = await event(slow)
        assert name == "state" and whole["models"][0]["held"] == 30
        shown.hold(31)
        await asyncio.gather(held(slow, 31), held(quick, 31))


async def test_one_that_is_a_little_late_is_sent_what_it_has_missed() -> None:
    shown = Shown()
    feed = Feed(shown.read, interval=0.0)
    async with feed.running(), aclosing(feed.listen()) as late, aclosing(feed.listen()) as quick:
        await event(late)
        await event(quick)
        for count in (1, 2, 3):
            shown.hold(count)
            await held(quick, count)
        frames = b""
        async for frame in late:
            frames += frame
            if frame:
                break
        assert frames.count(b"event: change\n") == 3 and b'"held":3' in frames


async def test_so_many_may_listen_and_no_more() -> None:
    feed = Feed(Shown().read)
    async with feed.running(), AsyncExitStack() as stack:
        for _ in range(LISTENERS):
            await event(await stack.enter_async_context(aclosing(feed.listen())))
        with pytest.raises(TooManyListeners, match=f"{LISTENERS} pages are open already"):
            await anext(feed.listen())


async def test_streams_end_with_the_feed() -> None:
    feed = Feed(Shown().read)
    async with aclosing(feed.listen()) as frames:
        async with feed.running():
            await event(frames)
        assert [frame async for frame in frames if frame] == []


async def test_a_reading_that_fails_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    shown = Shown()
    failures = iter([False, True])

    async def read() -> State:
        if next(failures, False):
            raise RuntimeError("half of it is missing")
        return await shown.read()

    feed = Feed(read, interval=0.0)
    async with feed.running(), aclosing(feed.listen()) as frames:
        await event(frames)
        shown.hold(4)
        await held(frames, 4)
    assert "half of it is missing" in caplog.text
