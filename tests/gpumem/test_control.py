"""The asyncio client: many calls at once; what is cancelled is stopped at the server; a server that is gone is told to all who wait."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client.control import Control
from gpumem.wire.errors import Cancelled, Forbidden, PeerGone
from tests.worlds.gpumem_server import MIB, Served, Weights, served, stopped_fill
from tests.worlds.processes import descriptors
from tests.worlds.waiting import until


async def test_a_crowd_of_tasks(server: Served, weights: Weights) -> None:
    async with contextlib.AsyncExitStack() as stack:
        controls = [await stack.enter_async_context(Control.connected(server.socket)) for _ in range(100)]
        filled = await asyncio.gather(*(control.fill(weights.layout, weights.sources, "host") for control in controls))
        assert sum(found.from_files for found in filled) == len(weights.data)


async def test_cancel_by_request(server: Served, weights: Weights) -> None:
    async with Control.connected(server.socket) as control, stopped_fill(server, control, weights) as filling:
        number = min(control._waiting)
        await control._ask(pb.Request(cancel=pb.Cancel(fill=number)))
        with pytest.raises(Cancelled, match="stays"):
            await filling


async def test_no_server_is_told_with_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(PeerGone, match=f"gpumem serve --socket {tmp_path}/none"):
        async with Control.connected(tmp_path / "none"):
            pass


async def test_a_server_that_is_killed_is_told_to_all_who_wait(tmp_path: Path, weights: Weights) -> None:
    with served(tmp_path, 64 * MIB) as server:
        os.kill(server.filler(), signal.SIGSTOP)
        async with Control.connected(server.socket) as control:
            filling = [asyncio.create_task(control.fill(weights.layout, weights.sources, "host")) for _ in range(3)]
            while not (await control.status()).fills:
                await asyncio.sleep(0.001)
            filler = (await control.status()).devices[0].filler_pid
            server.kill()
            for result in await asyncio.gather(*filling, return_exceptions=True):
                assert isinstance(result, PeerGone)
                assert "connect again when it is back" in str(result)
            with pytest.raises(PeerGone, match="connect again"):
                await control.status()
        os.kill(filler, signal.SIGCONT)


async def test_a_server_that_does_not_answer(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Control.connected(server.socket) as control:
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(PeerGone, match=r"did not answer within 0\.05 s: see its log"):
                await control._ask(pb.Request(status=pb.GetStatus()), seconds=0.05)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        assert (await control.status()).devices  # the late answer is not taken for this one's


async def test_what_the_operator_sets(server: Served) -> None:
    async with Control.connected(server.socket) as control:
        path = await control.tenant("green")
        await control.quota("green", MIB)
        async with Control.connected(path) as tenant:
            assert tenant.welcome.namespace == "green"
            with pytest.raises(Forbidden, match="the operator's"):
                await tenant.reserve("host", 0)


@pytest.mark.usefixtures("no_garbage")
async def test_files_of_a_fill_that_is_cancelled_as_they_are_opened_are_closed(server: Served, weights: Weights) -> None:
    async with Control.connected(server.socket) as control:
        before = len(descriptors(os.getpid()))
        for turns in range(10):
            filling = asyncio.create_task(control.fill(weights.layout, weights.sources, "host"))
            for _ in range(turns):
                await asyncio.sleep(0)
            filling.cancel()
            await asyncio.wait([filling])
        await until(lambda: len(descriptors(os.getpid())) == before, "all are closed")
