"""Chunks from several sources: whole, in whatever way some of them fail, and only the chunk that a source failed goes to the next."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.fetch import Fetch, Patience
from restore_agent.transfer.source import Absent, Altered, Denied, TransferError, Unreachable
from tests.worlds.faulty_source import FaultySource, chunk_of
from tests.worlds.virtual_time import LoopClock, run

DATA = bytes(range(256)) * 16
CHUNK = chunk_of(DATA)
SIZE = len(DATA)


def fetch(*sources: FaultySource, moved: Callable[[int], None] = lambda count: None) -> bytes:
    """What is brought of CHUNK, in virtual time. Raises what `bring` does."""

    async def bring() -> bytes:
        target = bytearray(SIZE)
        await Fetch(lambda chunk: sources, clock=LoopClock(asyncio.get_running_loop()), moved=moved).bring(CHUNK, memoryview(target))
        return bytes(target)

    return run(bring())


def source(name: str = "a") -> FaultySource:
    return FaultySource(name, [DATA])


def test_the_first_source_is_asked_alone_where_it_has_all() -> None:
    first, second = source(), source("b")
    assert fetch(first, second) == DATA
    assert (first.asked, second.asked) == ([(CHUNK.hash, 0)], [])


def test_what_came_before_a_break_is_kept_and_the_next_goes_on_behind_it() -> None:
    first, second, moved = source(), source("b"), list[int]()
    first.breaks_after = 3000
    assert fetch(first, second, moved=moved.append) == DATA
    assert second.asked == [(CHUNK.hash, 3000)]
    assert sum(moved) == SIZE and min(moved) > 0


def test_the_only_source_is_asked_again_where_it_broke_off() -> None:
    only = source()
    only.breaks_after = 2000
    assert fetch(only) == DATA
    assert only.asked == [(CHUNK.hash, at) for at in (0, 2000, 4000)]


def test_a_source_that_lies_is_left_for_the_next_and_none_of_its_bytes_stay() -> None:
    first, second, moved = source(), source("b"), list[int]()
    first.replace(CHUNK, DATA[:5] + b"!" + DATA[6:])
    assert fetch(first, second, moved=moved.append) == DATA
    assert second.asked == [(CHUNK.hash, 0)]
    assert sum(moved) == SIZE


def test_a_beginning_that_was_a_lie_is_not_held_against_who_went_on() -> None:
    first, second = source(), source("b")
    first.replace(CHUNK, b"!" + DATA[1:])
    first.breaks_after = 1000
    assert fetch(first, second) == DATA
    assert second.asked == [(CHUNK.hash, 1000), (CHUNK.hash, 0)]


def test_a_source_that_ends_early_is_left_and_its_beginning_is_used() -> None:
    first, second = source(), source("b")
    first.replace(CHUNK, DATA[:1500])
    assert fetch(first, second) == DATA
    assert second.asked == [(CHUNK.hash, 1500)]


def test_a_source_that_sends_too_much_is_left() -> None:
    first, second = source(), source("b")
    first.replace(CHUNK, DATA + b"more")
    first.sends_too_much = True
    assert fetch(first, second) == DATA


@pytest.mark.parametrize("fault", ["hangs", "pause"])
def test_a_slow_source_is_left_for_another(fault: str) -> None:
    first, second = source(), source("b")
    setattr(first, fault, True if fault == "hangs" else 8.0)
    assert fetch(first, second) == DATA
    assert first.asked == [(CHUNK.hash, 0)]


def test_a_slow_source_is_waited_for_where_it_is_the_only_one() -> None:
    only = source()
    only.pause = 8.0
    assert fetch(only) == DATA
    assert len(only.asked) == 1


def test_a_source_that_could_not_be_reached_is_asked_last_for_a_while() -> None:
    other = bytes(reversed(DATA))
    chunk = chunk_of(other)

    async def bring() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        first, second = FaultySource("a", [DATA, other]), FaultySource("b", [DATA, other])
        first.refuses = lambda key: Unreachable("a is gone")
        fetch = Fetch(lambda chunk: [first, second], clock=LoopClock(asyncio.get_running_loop()))
        target = memoryview(bytearray(SIZE))
        await fetch.bring(CHUNK, target)
        await fetch.bring(chunk, target)
        asked_beside = list(first.asked)
        await asyncio.sleep(Patience().aside)
        await fetch.bring(chunk, target)
        return asked_beside, first.asked

    beside, after = run(bring())
    assert beside == [(CHUNK.hash, 0)]
    assert after == [(CHUNK.hash, 0), (chunk.hash, 0)]


@pytest.mark.parametrize(
    ("errors", "word"),
    [
        ([Absent("a has none"), Absent("b has none")], Absent),
        ([Absent("a has none"), Denied("b lets nobody")], Denied),
        ([Unreachable("a is gone"), Absent("b has none")], Unreachable),
        ([Altered("a lies"), Unreachable("b is gone")], Altered),
    ],
)
def test_where_nobody_has_it_the_gravest_is_said_and_what_the_others_did(errors: list[TransferError], word: type[TransferError]) -> None:
    sources = [source("a"), source("b")]
    for each, error in zip(sources, errors, strict=True):
        each.refuses = lambda key, error=error: error  # type: ignore[misc]
    with pytest.raises(word) as raised:
        fetch(*sources)
    assert all(str(error) in str(raised.value) for error in errors)


def test_of_a_chunk_that_nobody_may_be_asked_for_that_is_said() -> None:
    with pytest.raises(Absent, match="on no source"):
        fetch()


async def test_many_are_brought_at_once_and_kept_in_threads() -> None:
    contents = [bytes([number]) * 100_000 for number in range(20)]
    chunks = [chunk_of(data) for data in contents]
    one, other = FaultySource("a", contents[:10]), FaultySource("b", contents)
    kept: dict[str, bytes] = {}
    arrived: list[Chunk] = []

    def keep(chunk: Chunk, data: memoryview) -> None:
        assert threading.current_thread() is not threading.main_thread()
        kept[chunk.hash] = bytes(data)

    def has_arrived(chunk: Chunk) -> None:
        assert chunk.hash in kept
        arrived.append(chunk)

    await Fetch(lambda chunk: [one, other], streams=4).bring_all(chunks, keep, has_arrived)
    assert kept == {chunk_of(data).hash: data for data in contents}
    assert set(arrived) == set(chunks)
    assert len(other.asked) == 10


async def test_a_chunk_that_nobody_has_ends_all_and_no_thread_keeps_on() -> None:
    contents = [bytes([number]) * 1000 for number in range(20)]
    lacking = FaultySource("a", contents[1:])
    kept: list[Chunk] = []
    with pytest.raises(Absent, match=chunk_of(contents[0]).hash):
        await Fetch(lambda chunk: [lacking], streams=4).bring_all(map(chunk_of, contents), lambda chunk, data: kept.append(chunk))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("keep")]


async def test_a_disk_that_is_full_ends_all() -> None:
    def keep(chunk: Chunk, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await Fetch(lambda chunk: [source()]).bring_all([CHUNK], keep)


async def test_ending_a_fetch_waits_for_what_is_being_kept() -> None:
    keeps, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def keep(chunk: Chunk, data: memoryview) -> None:
        keeps.set()
        assert may_end.wait(30)
        ended.set()

    fetching = asyncio.create_task(Fetch(lambda chunk: [source()]).bring_all([CHUNK], keep))
    assert await asyncio.to_thread(keeps.wait, 30)
    fetching.cancel()
    await asyncio.sleep(0)
    assert not fetching.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert ended.is_set()
