"""The pool of one device, over real memory: what is lent is zeros and nobody else's, whatever comes of those who ask."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator

import pytest

from gpumem.hardware.host import HostMemory
from gpumem.hardware.memory import DeviceFull
from gpumem.server.pool import Pool, Short
from tests.worlds.exhausted import no_threads
from tests.worlds.gpumem_server import MIB
from tests.worlds.processes import descriptors


class Crowded(HostMemory):
    """A device on which others take memory too."""

    def __init__(self, slab: int) -> None:
        super().__init__(slab)
        self.room = 1 << 40

    def create(self, size: int) -> int:
        if size > self.room:
            raise DeviceFull("others have it")
        self.room -= size
        return super().create(size)


@pytest.fixture
async def pool(no_garbage: None) -> AsyncIterator[Pool]:
    before = len(descriptors(os.getpid()))
    found = Pool(Crowded(8 * MIB))
    await found.resize(50 * MIB)
    keeping = asyncio.create_task(found.replenish())
    yield found
    keeping.cancel()
    await asyncio.wait([keeping])
    found.close()
    assert len(descriptors(os.getpid())) == before


async def settled(pool: Pool, free: int) -> None:
    async with asyncio.timeout(5):
        while pool.free != free:
            await asyncio.sleep(0.001)


async def test_what_is_taken_is_as_large_as_asked_and_zeros(pool: Pool) -> None:
    for size in (2, 8, 10, 14, 46, 50):
        taken = await pool.acquire(size * MIB)
        assert sum(slab.size for slab in taken) == size * MIB
        assert all(slab.size <= 8 * MIB for slab in taken)
        assert pool.free == (50 - size) * MIB
        for slab in taken:
            assert not any(os.pread(slab.fd, slab.size, 0))
            os.pwrite(slab.fd, b"secret", 100)
        pool.retire(taken)
        await settled(pool, 50 * MIB)


async def test_who_asks_again_for_as_much_as_was_given_back_finds_it_made(pool: Pool) -> None:
    taken = await pool.acquire(14 * MIB)
    pool.retire(taken)
    await settled(pool, 50 * MIB)
    memory = pool._memory
    assert isinstance(memory, Crowded)
    before = memory.room
    again = await pool.acquire(14 * MIB)
    assert [slab.size for slab in again] == [slab.size for slab in taken]
    assert memory.room == before, "nothing was made for it"
    pool.retire(again)


async def test_memory_that_was_lent_is_never_lent_again(pool: Pool) -> None:
    taken = await pool.acquire(50 * MIB)
    kept = [os.dup(slab.fd) for slab in taken]
    pool.retire(taken)
    again = await pool.acquire(50 * MIB)
    for slab in again:
        os.pwrite(slab.fd, b"the next owner's", 0)
    assert not any(any(os.pread(fd, 100, 0)) for fd in kept)
    pool.retire(again)
    for fd in kept:
        os.close(fd)


async def test_too_much_says_how_much_too_much(pool: Pool) -> None:
    first = await pool.acquire(20 * MIB)
    with pytest.raises(Short) as caught:
        await pool.acquire(40 * MIB)
    assert caught.value.missing == 10 * MIB
    assert pool.free == 30 * MIB
    pool.retire(first)


async def test_a_taker_that_is_cancelled_leaves_nothing_taken(pool: Pool) -> None:
    for turn in range(20):
        taking = asyncio.create_task(pool.acquire(14 * MIB))
        for _ in range(turn % 5):
            await asyncio.sleep(0)
        await asyncio.sleep(0.0005 * (turn // 5))
        taking.cancel()
        (result,) = await asyncio.gather(taking, return_exceptions=True)
        if not isinstance(result, BaseException):
            pool.retire(result)
        await settled(pool, 50 * MIB)
        assert pool.lent == 0


async def test_takers_at_once_do_not_get_the_same(pool: Pool) -> None:
    taken = await asyncio.gather(*(pool.acquire(10 * MIB) for _ in range(5)))
    inodes = [os.fstat(slab.fd).st_ino for slabs in taken for slab in slabs]
    assert len(set(inodes)) == len(inodes)
    assert pool.free == 0
    for slabs in taken:
        pool.retire(slabs)


async def test_what_the_device_does_not_give_back_is_owed_until_it_does(pool: Pool) -> None:
    memory = pool._memory
    assert isinstance(memory, Crowded)
    taken = await pool.acquire(20 * MIB)
    memory.room = 0
    pool.retire(taken)
    async with asyncio.timeout(5):
        while pool._spent:
            await asyncio.sleep(0.001)
    with pytest.raises(Short):
        await pool.acquire(40 * MIB)
    assert pool.owed == 20 * MIB
    memory.room = 1 << 40
    await settled(pool, 50 * MIB)


async def test_it_is_filled_again_where_no_more_threads_may_be_started(pool: Pool) -> None:
    over = threading.Event()
    others = [asyncio.ensure_future(asyncio.to_thread(over.wait)) for _ in range(4)]  # who has the threads that there are
    with no_threads():
        taken = await pool.acquire(16 * MIB)
        pool.retire(taken)
        await settled(pool, 50 * MIB)
    over.set()
    await asyncio.wait(others)
    assert pool.owed == 0


async def test_a_pool_is_made_smaller_at_once_and_larger_again(pool: Pool) -> None:
    taken = await pool.acquire(16 * MIB)
    await pool.resize(20 * MIB)
    assert pool.free + pool.lent <= 20 * MIB
    await pool.resize(0)
    assert (pool.free, pool.lent) == (0, 16 * MIB)
    pool.retire(taken)
    await pool.resize(30 * MIB)
    assert pool.free == 30 * MIB
