"""Filling: from files, through the arena, by several at once, stopped and gone on with, and with bytes that are not what they should be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client
from gpumem.client.control import Control
from gpumem.server.filling import MOVE
from gpumem.wire.errors import Corrupt, FillerLost, Forbidden, Invalid, NotFound, OutOfMemory
from tests.worlds.gpumem_server import MIB, Served, Weights, make_weights, served, stopped_fill


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    """New ones for each test: chunks stay in the arena until their room is wanted, and would not come from files again."""
    return make_weights(tmp_path / "weights.bin", 21 * MIB + 12345)


def read(server: Served, weights: Weights) -> bytes:
    with Client(server.socket) as client:
        return bytes(client.attach(weights.id).view())


async def test_by_way_of_the_arena(server: Served, weights: Weights) -> None:
    async with Control.connected(server.socket) as control:
        first = await control.fill(weights.layout, weights.sources, "")
        assert first.from_files == len(weights.data)
        status = await control.status()
        assert [(region.device, region.sealed) for region in status.regions] == [("", True)]
        # From here on the files are not needed.
        second = await control.fill(weights.layout, [], "host")
        assert (second.from_arena, second.from_files) == (len(weights.data), 0)
        third = await control.fill(weights.layout, [], "")
        assert third.there_before == len(weights.data)
    assert await asyncio.to_thread(read, server, weights) == weights.data


async def test_more_than_a_move_that_is_there_already_needs_no_room(tmp_path: Path) -> None:
    large = make_weights(tmp_path / "large", MOVE + 40 * MIB, chunk=16 * MIB)
    with served(tmp_path, reserve=8 * MIB, arena=MOVE + 48 * MIB) as server:
        async with Control.connected(server.socket) as control:
            assert (await control.fill(large.layout, large.sources, "")).from_files == len(large.data)
            assert (await control.fill(large.layout, [], "")).there_before == len(large.data)


async def test_what_is_pinned_in_the_arena_stays_and_the_rest_goes(server: Served, tmp_path: Path) -> None:
    pinned, other, third = (make_weights(tmp_path / str(number), 30 * MIB) for number in range(3))
    async with Control.connected(server.socket) as control:
        await control.fill(pinned.layout, pinned.sources, "", pinned=True)
        await control.fill(other.layout, other.sources, "")
        await control.fill(third.layout, third.sources, "")
        ready = {region.id: region.sealed for region in (await control.status()).regions}
        assert ready == {pinned.id: True, other.id: False, third.id: True}
        assert (await control.fill(pinned.layout, [], "host")).from_arena == len(pinned.data)
        await control.pin(third.ref(""))
        with pytest.raises(OutOfMemory, match="--arena"):
            await control.fill(other.layout, other.sources, "")
        await control.evict(pinned.ref(""))
        await control.fill(other.layout, other.sources, "")


async def test_more_than_the_arena_holds_is_refused_and_gives_it_back(server: Served, tmp_path: Path) -> None:
    large = make_weights(tmp_path / "large", 70 * MIB)
    async with Control.connected(server.socket) as control:
        with pytest.raises(OutOfMemory, match="arena of"):
            await control.fill(large.layout, large.sources, "", pinned=True)
        small = make_weights(tmp_path / "small", 50 * MIB)
        await control.fill(small.layout, small.sources, "", pinned=True)


async def test_into_spare_room_alone_nobodys_chunks_leave(tmp_path: Path) -> None:
    with served(tmp_path / "small", reserve=32 * MIB, arena=40 * MIB) as server:
        wanted, passed, other = (make_weights(tmp_path / name, 16 * MIB) for name in ("wanted", "passed", "other"))
        async with Control.connected(server.socket) as control:
            await control.fill(wanted.layout, wanted.sources, "")
            await control.fill(passed.layout, passed.sources, "")
            await control.evict(passed.ref(""))
            await control.fill(other.layout, other.sources, "", spare=True)
            there = {region.id for region in server.status().regions if region.sealed}
            assert there == {wanted.id, other.id}, "what is nobody's any more has left"
            with pytest.raises(OutOfMemory, match="of which nobody has"):
                await control.fill(passed.layout, passed.sources, "", spare=True)
            assert {region.id for region in server.status().regions if region.sealed} == there
            await control.fill(wanted.layout, [], "host", spare=True)
            await control.fill(other.layout, [], "host", spare=True)
            with pytest.raises(OutOfMemory):
                await control.fill(passed.layout, passed.sources, "host", spare=True)
            await control.fill(passed.layout, passed.sources, "host")


async def test_many_fills_through_a_small_arena(server: Served, tmp_path: Path) -> None:
    """Four at once want 80 MiB of an arena of 64: some may be refused, none may stand still, and none may be wrong."""
    every = [make_weights(tmp_path / str(number), 20 * MIB) for number in range(4)]
    async with Control.connected(server.socket) as control:
        results = await asyncio.gather(*(control.fill(w.layout, w.sources, "", pinned=True) for w in every), return_exceptions=True)
        assert [type(result) for result in results if isinstance(result, BaseException)] == [OutOfMemory]
        for weights, result in zip(every, results, strict=True):
            if not isinstance(result, BaseException):
                assert (await control.fill(weights.layout, [], "host")).from_arena == len(weights.data)
                assert await asyncio.to_thread(read, server, weights) == weights.data


async def test_several_who_ask_at_once_share_one_fill(server: Served, weights: Weights) -> None:
    async with Control.connected(server.socket) as control, Control.connected(server.socket) as other:
        asked = [who.fill(weights.layout, weights.sources, "host") for who in (control, other) * 4]
        results = await asyncio.gather(*asked)
    assert sorted(result.from_files for result in results) == [0] * 7 + [len(weights.data)]
    assert await asyncio.to_thread(read, server, weights) == weights.data


@pytest.mark.parametrize("device", ["host", ""])
@pytest.mark.parametrize("how", ["a changed byte", "a torn file", "another chunk's place"])
async def test_bytes_that_are_not_the_chunks_are_never_lent(
    server: Served, weights: Weights, tmp_path: Path, how: str, device: str
) -> None:
    path = tmp_path / "spoiled"
    shutil.copy(weights.path, path)
    sources = [(path, weights.offset, 0, weights.chunks)]
    if how == "a changed byte":
        with path.open("r+b") as file:
            file.seek(15 * MIB)
            (byte,) = file.read(1)
            file.seek(15 * MIB)
            file.write(bytes([byte ^ 1]))
    elif how == "a torn file":
        os.truncate(path, weights.offset + 20 * MIB)
    else:
        sources = [(path, weights.offset + 1, 0, weights.chunks)]
    async with Control.connected(server.socket) as control:
        with pytest.raises(Corrupt):
            await control.fill(weights.layout, sources, device)
        with Client(server.socket) as client, pytest.raises(NotFound):
            client.attach(weights.id)
        await control.fill(weights.layout, weights.sources, "host")
    assert await asyncio.to_thread(read, server, weights) == weights.data


async def test_sources_are_checked(server: Served, weights: Weights, tmp_path: Path) -> None:
    async with Control.connected(server.socket) as control:
        for sources, what in (
            ([(weights.path, 0, 0, weights.chunks + 1)], "no such file or chunk"),
            ([(weights.path, 0, 0, 2), (weights.path, 0, 1, 1)], "has two"),
            ([(Path("/dev/zero"), 0, 0, 1)], "regular file"),
        ):
            with pytest.raises(Invalid, match=what):
                await control.fill(weights.layout, sources, "host")
        with pytest.raises(NotFound, match="no source brings it"):
            await control.fill(weights.layout, [(weights.path, weights.offset, 0, 1)], "host")
        with pytest.raises(Invalid, match="nothing to fill"):
            await control.fill(pb.Layout(size=10), [], "host")


async def test_a_fill_is_stopped_and_gone_on_with(tmp_path: Path, server: Served) -> None:
    weights = make_weights(tmp_path / "weights", 40 * MIB)
    async with Control.connected(server.socket) as control:
        async with stopped_fill(server, control, weights) as filling:
            filling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await filling
            with pytest.raises(Forbidden, match="in use"):
                await control.evict(weights.ref())
            again = asyncio.create_task(control.fill(weights.layout, weights.sources, "host"))
        await again
    assert await asyncio.to_thread(read, server, weights) == weights.data


async def test_least_recently_used_goes_first_and_pinned_last(server: Served, tmp_path: Path) -> None:
    every = [make_weights(tmp_path / str(number), 60 * MIB) for number in range(4)]
    async with Control.connected(server.socket) as control:
        for weights in every[:3]:
            await control.fill(weights.layout, weights.sources, "host", pinned=weights is every[0])
        await asyncio.to_thread(read, server, every[1])
        await control.fill(every[3].layout, every[3].sources, "host")
        assert {region.id for region in (await control.status()).regions} == {every[0].id, every[1].id, every[3].id}


async def test_memory_is_yielded_and_taken_back(server: Served, tmp_path: Path) -> None:
    weights, free = make_weights(tmp_path / "1", 30 * MIB), make_weights(tmp_path / "2", 30 * MIB)
    async with Control.connected(server.socket) as control:
        await control.fill(weights.layout, weights.sources, "host", pinned=True)
        await control.fill(free.layout, free.sources, "host")
        with Client(server.socket) as client:
            region = client.attach(weights.id)
            assert await control.reserve("host", 0) == 30 * MIB  # what is leased cannot be given back
            assert region.view() == weights.data
        async with asyncio.timeout(10):
            while (await control.status()).regions:  # until the server has heard that nobody leases it any more
                await asyncio.sleep(0.01)
        assert await control.reserve("host", 192 * MIB) == 192 * MIB


async def test_the_filler_dies_and_another_goes_on(server: Served, tmp_path: Path) -> None:
    """Killed while it certainly has orders, then at moments spread over a whole fill."""
    weights = make_weights(tmp_path / "weights", 40 * MIB, chunk=MIB)
    for delay in (None, 0.0, 0.002, 0.005, 0.01, 0.02):
        async with Control.connected(server.socket) as control:
            filler = server.filler()
            if delay is None:
                os.kill(filler, signal.SIGSTOP)
            filling = asyncio.create_task(control.fill(weights.layout, weights.sources, "host"))
            if delay is None:
                while not (await control.status()).fills:
                    await asyncio.sleep(0.001)
            else:
                await asyncio.sleep(delay)
            os.kill(filler, signal.SIGKILL)
            await filling
            assert await asyncio.to_thread(read, server, weights) == weights.data
            await control.evict(weights.ref())
    assert server.host.filler_restarts >= 5


async def test_a_filler_that_dies_at_every_try_is_told(server: Served, weights: Weights) -> None:
    async with Control.connected(server.socket) as control:
        filling = asyncio.create_task(control.fill(weights.layout, weights.sources, "host"))
        killed: set[int] = set()
        while not filling.done():
            pid = (await control.status()).devices[0].filler_pid
            if pid and pid not in killed:
                with contextlib.suppress(ProcessLookupError):  # of the one that is gone
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            await asyncio.sleep(0)
        try:
            await filling
        except FillerLost as error:
            assert "again" in str(error)
        else:
            assert await asyncio.to_thread(read, server, weights) == weights.data
        await control.fill(weights.layout, weights.sources, "host")
