"""What the operator sees of a server, and how little of it a namespace sees."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.arena import Arena, ChunkSet
from gpumem.filler.files import BLOCK
from gpumem.hardware.host import HostMemory
from gpumem.server.device import Device
from gpumem.server.filling import Job
from gpumem.server.leases import Owner
from gpumem.server.regions import Chunks, Region
from gpumem.server.status import status_of
from tests.worlds.gpumem_server import MIB

RED, BLUE = Owner("red", 7, "engine"), Owner("blue", 8, "other")
LAYOUT = pb.Layout(size=100, chunks=[pb.Chunk(hash=bytes([n]) * 32, size=n) for n in (10, 20, 30)]).SerializeToString()


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    found = Device(HostMemory(2 * MIB))
    await found.resize(16 * MIB)
    yield found
    found.pool.close()


async def make(device: Device, name: bytes, owner: Owner) -> Region:
    return await device.create(name * 32, LAYOUT, Chunks.parse(LAYOUT), owner, private=True, pinned=False)


async def test_a_device_adds_up(device: Device) -> None:
    await make(device, b"r", RED)
    await device.lend_scratch(4 * MIB, BLUE)
    (found,) = status_of({"host": device}, Arena(0), (), None).devices
    assert (found.identity, found.wanted_bytes, found.free_bytes) == ("host", 16 * MIB, 10 * MIB)
    assert (found.regions_bytes, found.scratch_bytes, found.owed_bytes, found.slabs) == (2 * MIB, 4 * MIB, 0, 6)
    assert 0 < found.device_free_bytes <= found.device_total_bytes


async def test_a_region_is_idle_while_nobody_reads_it(device: Device) -> None:
    region = await make(device, b"r", RED)
    region.filled = {0, 2}
    (found,) = status_of({"host": device}, Arena(0), (), None).regions
    assert (found.filled_bytes, found.sealed, found.size, found.leases) == (40, False, 2 * MIB, 0)
    assert found.idle_seconds > 0
    device.seal(region)
    device.lend(region, RED)
    (found,) = status_of({"host": device}, Arena(0), (), None).regions
    assert (found.filled_bytes, found.sealed, found.leases, found.idle_seconds) == (100, True, 1, 0)


async def test_a_namespace_sees_its_own_and_the_operator_all(device: Device) -> None:
    arena = Arena(4 * BLOCK)
    for owner in (RED, BLUE):
        device.lend(await make(device, owner.namespace[:1].encode(), owner), owner, writable=True)
        arena.add_set((owner.namespace, b"s" * 32), ChunkSet([], 0, False, []))
    jobs = [Job(Chunks.parse(LAYOUT), owner, {}, [], device, None, pb.Filled(id=b"f" * 32)) for owner in (RED, BLUE)]
    everything, red, nobodys = (status_of({"host": device}, arena, jobs, who) for who in (None, "red", "green"))
    assert [len(each) for each in (everything.regions, everything.leases, everything.fills)] == [4, 2, 2]
    assert [(region.device, region.namespace) for region in red.regions] == [("host", "red"), ("", "red")]
    assert [(lease.label, lease.pid, lease.writable, lease.region) for lease in red.leases] == [("engine", 7, True, b"r" * 32)]
    assert len(red.fills) == 1
    assert not (nobodys.regions or nobodys.leases or nobodys.fills)
    assert len(nobodys.devices) == 1


async def test_chunks_in_the_arena_are_a_region_of_no_device() -> None:
    arena = Arena(4 * BLOCK)
    place = arena.make_room(BLOCK, 0)
    assert place is not None
    arena.publish(place, "", b"a")
    arena.add_set(("", b"s" * 32), ChunkSet([("", b"a"), ("", b"b")], 2 * BLOCK, True, []))
    status = status_of({}, arena, (), None)
    (found,) = status.regions
    assert (found.device, found.size, found.filled_bytes, found.sealed, found.pinned) == ("", 2 * BLOCK, BLOCK, False, True)
    assert (status.arena_bytes, status.arena_used_bytes, status.arena_idle_bytes) == (4 * BLOCK, BLOCK, 0)


async def test_a_fill_tells_how_far_it_is(device: Device) -> None:
    job = Job(Chunks.parse(LAYOUT), RED, {}, [], device, None, pb.Filled(id=b"f" * 32, there_before=10))
    job.done = {0, 1}
    (found,) = status_of({"host": device}, Arena(0), [job], None).fills
    assert (found.device, found.region, found.size, found.filled_bytes) == ("host", b"f" * 32, 60, 30)
    assert found.bytes_per_second > 0
