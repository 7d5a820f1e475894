"""How far weights are that gpumem brings for a snapshot: by a real server, whose filler stands still while it is looked at."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from zerowake_proto import agent_pb2
from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire.errors import PeerGone
from restore_agent.drivers.weights import Weights
from restore_agent.drivers.weights_fills import WeightsFills
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.service.stream import Stream
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.manifest import PartRecord, WeightsRecord, WeightsRegion
from restore_agent.transfer.progress import Progress
from tests.worlds.agent_service import served_node
from tests.worlds.gpumem_server import MIB, Served, make_weights, served
from tests.worlds.snapshots import publish
from tests.worlds.waiting import until

SIZE = 8 * MIB


def region(path: Path, size: int = SIZE) -> WeightsRegion:
    made = make_weights(path, size)
    part = PartRecord(path=path.name, offset=made.offset, first_chunk=0, chunks=made.chunks)
    return WeightsRegion(WeightsRecord(region=made.id.hex(), size=size, parts=(part,), folder=str(path.parent)), made.layout, path.parent)


@pytest.fixture
async def server(short_folder: Path) -> AsyncIterator[Served]:
    with served(short_folder, reserve=64 * MIB, arena=32 * MIB) as server:
        yield server


@pytest.mark.parametrize(("room", "rung"), [(64 * MIB, "gpu"), (SIZE // 2, "arena")])
async def test_what_is_on_its_way_is_told_until_it_has_come(short_folder: Path, tmp_path: Path, room: int, rung: str) -> None:
    """Both regions of a snapshot as one way; in a node's stream, to who listens."""
    async with served_node(short_folder) as world:
        with served(short_folder, reserve=room, arena=64 * MIB) as server:
            weights, snapshot = world.node.weights, publish(world.node.store, b"a" * 4096)
            regions = [region(tmp_path / name) for name in ("one", "two")]
            filler = server.filler()
            os.kill(filler, signal.SIGSTOP)
            try:
                staging = [asyncio.create_task(weights.stage(each, of=snapshot)) for each in regions]
                wanted = WeightsRung.GPU if rung == "gpu" else WeightsRung.MEMORY
                await until(lambda: weights.on_their_way() == [(snapshot, wanted, Progress(0, 0, 2 * SIZE))])
                told = await first_transfer(Stream(world.node))
                number = agent_pb2.WEIGHTS_RUNG_GPU if rung == "gpu" else agent_pb2.WEIGHTS_RUNG_MEMORY
                assert (told.snapshot.digest, told.rung, told.weights_rung) == (snapshot.digest, agent_pb2.RUNG_UNSPECIFIED, number)
                assert (told.progress.done_bytes, told.progress.total_bytes) == (0, 2 * SIZE)
            finally:
                os.kill(filler, signal.SIGCONT)
            await asyncio.gather(*staging)
            assert weights.on_their_way() == [] and not world.node.inventory.transfers()


async def first_transfer(stream: Stream) -> agent_pb2.Transfer:
    async for update in stream.updates():
        if update.HasField("transfer"):
            return update.transfer
    raise AssertionError("the stream has ended")


async def test_a_fill_that_is_given_up_or_fails_is_on_its_way_no_more(server: Served, tmp_path: Path) -> None:
    weights, snapshot = Weights(server.socket), Snapshot("d", None, tmp_path)  # type: ignore[arg-type]  # nobody looks into it
    filler = server.filler()
    os.kill(filler, signal.SIGSTOP)
    try:
        staging = asyncio.create_task(weights.stage(region(tmp_path / "one"), of=snapshot))
        await until(weights.on_their_way)
        staging.cancel()
        await asyncio.wait([staging])
        assert weights.on_their_way() == []
    finally:
        os.kill(filler, signal.SIGCONT)


class Saying:
    """A gpumem that says what a test wants."""

    def __init__(self) -> None:
        self.fills: list[pb.FillStatus] | None = []

    async def status(self) -> Any:
        if self.fills is None:
            raise PeerGone("it is gone")
        return pb.Status(fills=self.fills)


async def test_the_bytes_of_a_region_that_has_come_count_until_the_last_has(tmp_path: Path) -> None:
    said, fills = Saying(), WeightsFills()
    snapshot = Snapshot("d", None, tmp_path)  # type: ignore[arg-type]  # nobody looks into it
    one, two = (WeightsRecord(region=name * 32, size=10, parts=()) for name in ("a1", "b2"))

    def so_far(*done: int) -> None:
        both = zip((one, two), done, strict=False)
        said.fills = [pb.FillStatus(device="host", region=bytes.fromhex(each.region), size=10, filled_bytes=at) for each, at in both]

    control: Any = said
    so_far(2, 3)
    async with fills.told(control, two, "host", snapshot):
        async with fills.told(control, one, "host", snapshot):
            await until(lambda: fills.now() == [(snapshot, WeightsRung.GPU, Progress(5, 0, 20))])
            so_far(4, 8)
            await until(lambda: fills.now() == [(snapshot, WeightsRung.GPU, Progress(12, 7, 20))])
        assert fills.now()[0][2].done >= 18, "all ten of the first"
        said.fills = None
    assert fills.now() == []
    async with fills.told(control, one, "", None):
        assert fills.now() == []
