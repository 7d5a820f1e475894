"""The foreman: there is a filler, however often one dies, and whoever has an order under way hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler import foreman as module
from gpumem.filler.arena import Arena
from gpumem.filler.foreman import Foreman
from gpumem.hardware.host import HostMemory
from gpumem.wire.errors import FillerLost, Invalid
from tests.worlds.exhausted import no_threads
from tests.worlds.gpumem_server import MIB
from tests.worlds.processes import alive
from tests.worlds.waiting import until


@contextlib.asynccontextmanager
async def kept(foreman: Foreman) -> AsyncIterator[asyncio.Task[None]]:
    """Runs it until the block ends. Afterwards no process is left."""
    running = asyncio.create_task(foreman.run())
    try:
        yield running
    finally:
        pid = foreman.pid
        running.cancel()
        await asyncio.wait([running])
        assert not pid or not alive(pid)


@pytest.fixture
def arena() -> Iterator[Arena]:
    found = Arena(4 * MIB)
    found.open()
    yield found
    found.close()


@pytest.fixture
async def foreman(arena: Arena) -> AsyncIterator[Foreman]:
    found = Foreman("host", arena)
    async with kept(found):
        yield found


async def test_a_filler_that_is_handed_out_is_ready(foreman: Foreman) -> None:
    filler = await foreman.filler()
    assert (foreman.pid, foreman.restarts) == (filler.pid, 0)
    assert await foreman.filler() is filler
    fd = HostMemory().create(2 * MIB)
    await filler.order(pb.Order(open=pb.OpenRange(range=1, pieces=[2 * MIB], writable=True)), [fd])
    os.close(fd)


async def test_orders_at_once_are_each_answered(foreman: Foreman) -> None:
    filler = await foreman.filler()
    fd = HostMemory().create(2 * MIB)
    pieces = [2 * MIB]
    opened = (filler.order(pb.Order(open=pb.OpenRange(range=number, pieces=pieces * (1 + number % 2))), [fd]) for number in range(20))
    results = await asyncio.gather(*opened, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), Invalid] * 10
    os.close(fd)


async def test_after_a_death_there_is_another(foreman: Foreman) -> None:
    for restarts in (1, 2, 3):
        filler = await foreman.filler()
        os.kill(filler.pid, signal.SIGKILL)
        await filler.gone()
        assert filler.dead
        another = await foreman.filler()
        assert another.pid != filler.pid
        assert foreman.restarts == restarts
        with pytest.raises(FillerLost, match="ask once more"):
            await filler.order(pb.Order(close=pb.CloseRange(range=1)))


async def test_an_order_under_way_hears_of_the_death(foreman: Foreman) -> None:
    filler = await foreman.filler()
    os.kill(filler.pid, signal.SIGSTOP)
    ordered = asyncio.create_task(filler.order(pb.Order(close=pb.CloseRange(range=1))))
    await until(lambda: filler._waiting, "the order is under way")
    os.kill(filler.pid, signal.SIGKILL)
    with pytest.raises(FillerLost, match="ask once more"):
        await ordered


async def test_a_filler_that_does_not_answer_in_time_is_ended(foreman: Foreman) -> None:
    filler = await foreman.filler()
    os.kill(filler.pid, signal.SIGSTOP)
    with pytest.raises(FillerLost, match="did not finish an order within 0 s"):
        await filler.order(pb.Order(close=pb.CloseRange(range=1)), seconds=0.05)
    assert (await foreman.filler()).pid != filler.pid


async def test_who_gave_an_order_may_go_away(foreman: Foreman) -> None:
    filler = await foreman.filler()
    os.kill(filler.pid, signal.SIGSTOP)
    ordered = asyncio.create_task(filler.order(pb.Order(close=pb.CloseRange(range=1))))
    await until(lambda: filler._waiting, "the order is under way")
    ordered.cancel()
    await asyncio.wait([ordered])
    os.kill(filler.pid, signal.SIGCONT)
    await filler.order(pb.Order(close=pb.CloseRange(range=1)))  # the answer to the other is not taken for this one's
    assert foreman.restarts == 0


async def test_one_that_never_starts_is_told_with_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESTART_SECONDS", (0.0,))
    foreman = Foreman("GPU-none", Arena(0))
    async with kept(foreman):
        await until(lambda: foreman.restarts >= 2, "it is tried again")
        with pytest.raises(FillerLost, match="no filler for GPU-none within 0 s: the filler"):
            await foreman.filler(seconds=0.01)
        assert foreman.pid == 0


async def test_one_that_no_thread_could_wait_for_is_started_again(monkeypatch: pytest.MonkeyPatch, arena: Arena) -> None:
    """What asyncio starts a child with needs one."""
    monkeypatch.setattr(module, "_RESTART_SECONDS", (0.0,))
    foreman = Foreman("host", arena)
    with no_threads():
        keeping = asyncio.create_task(foreman.run())
        await until(lambda: foreman.restarts, "it has failed")
    assert (await foreman.filler()).pid
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_its_end_is_the_fillers_too_in_the_middle_of_an_order(arena: Arena) -> None:
    foreman = Foreman("host", arena)
    async with kept(foreman) as running:
        filler = await foreman.filler()
        os.kill(filler.pid, signal.SIGSTOP)
        ordered = asyncio.create_task(filler.order(pb.Order(close=pb.CloseRange(range=1))))
        await until(lambda: filler._waiting, "the order is under way")
        running.cancel()
        with pytest.raises(FillerLost):
            await ordered
        await asyncio.wait([running])
        assert not alive(filler.pid)
