"""Who reads, who waits and who pauses: two at a time, until a request waits for one."""

from __future__ import annotations

import asyncio
import contextlib

from restore_agent.pages.fill import Arena
from restore_agent.sequences.staging_order import StagingOrder, Turn
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.page_runs import PAGE, PageRun
from tests.worlds.waiting import until


class Reader:
    """Takes its turn, and reads chunks of a page for as long as there is one."""

    def __init__(self, order: StagingOrder) -> None:
        self.turn = Turn()
        self.begun = asyncio.Event()
        self.done = asyncio.Event()
        self.task = asyncio.create_task(self._run(order))

    async def _run(self, order: StagingOrder) -> None:
        async with order.turn(self.turn):
            self.begun.set()
            await self.done.wait()

    async def end(self) -> None:
        self.done.set()
        await self.task


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def paused(chunks: int) -> tuple[Arena, Reader, Reader]:
    """An arena of so many chunks, the one who reads into it, and one whose request waits, for which that pauses."""
    order = StagingOrder()
    arena = Arena([Chunk(f"{number:064x}", PAGE) for number in range(chunks)], _index(chunks))
    calm, urgent = Reader(order), Reader(order)
    await settled()
    calm.turn.reads_into(arena)
    order.hurry(urgent.turn)
    return arena, calm, urgent


async def test_two_read_at_a_time_in_the_order_in_which_they_came() -> None:
    order = StagingOrder()
    readers = [Reader(order) for _ in range(4)]
    await settled()
    assert [each.begun.is_set() for each in readers] == [True, True, False, False]
    await readers[1].end()
    await settled()
    assert [each.begun.is_set() for each in readers] == [True, True, True, False]
    readers[3].task.cancel()
    for reader in (readers[0], readers[2]):
        await reader.end()
    with contextlib.suppress(asyncio.CancelledError):
        await readers[3].task
    assert not readers[3].begun.is_set()


async def test_what_a_request_waits_for_overtakes_and_nothing_begins_meanwhile() -> None:
    order = StagingOrder()
    readers = [Reader(order) for _ in range(4)]
    await settled()
    for number in (2, 3):  # however many they are
        order.hurry(readers[number].turn)
    await settled()
    assert all(each.begun.is_set() for each in readers)
    late = Reader(order)
    for reader in readers[:2]:
        await reader.end()
    await settled()
    assert not late.begun.is_set()
    await readers[2].end()
    await settled()
    assert not late.begun.is_set(), "another request waits still"
    await readers[3].end()
    await late.begun.wait()
    await late.end()


async def test_what_has_begun_pauses_between_chunks_while_a_request_waits() -> None:
    arena, calm, urgent = await paused(400)
    assert calm.turn.has_paused
    read: list[Chunk] = []
    reading = asyncio.create_task(arena.read(lambda chunk, target: read.append(chunk)))
    await asyncio.to_thread(lambda: None)
    assert read == []
    await urgent.end()
    await asyncio.wait_for(reading, 60)
    assert len(read) == 400
    assert arena.arrived_bytes == arena.size
    await calm.end()
    assert not urgent.turn.has_paused


async def test_one_that_is_given_up_while_it_pauses_ends() -> None:
    arena, calm, urgent = await paused(40)
    reading = asyncio.create_task(arena.read(lambda chunk, target: None))
    await asyncio.sleep(0)
    reading.cancel()
    await until(reading.done, "its readers ended")
    for reader in (calm, urgent):
        await reader.end()


def _index(pages: int) -> bytes:
    return bytes(PageRun(7, 1 << 32, pages * PAGE))
