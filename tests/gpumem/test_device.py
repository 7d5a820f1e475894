"""One device's books, over the host's memory: who gets memory, what goes for it, and what the one who gets none is told."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.hardware.host import HostMemory
from gpumem.hardware.memory import DeviceFull
from gpumem.server import device as module
from gpumem.server.device import Device
from gpumem.server.leases import Owner
from gpumem.server.regions import Chunks, Region, State
from gpumem.wire.errors import Exists, Forbidden, NotFound, NotSealed, OutOfMemory, StillMapped
from tests.worlds.gpumem_server import MIB
from tests.worlds.waiting import until

OPERATOR, RED, BLUE = Owner("", 1, "operator"), Owner("red", 2, "engine"), Owner("blue", 3, "engine")
HELD = 64 * MIB


class Slow(HostMemory):
    """Memory that its device does not have at once."""

    refusals = 0

    def create(self, size: int) -> int:
        if self.refusals:
            self.refusals -= 1
            raise DeviceFull("not yet")
        return super().create(size)


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    found = Device(Slow(8 * MIB))
    assert await found.resize(HELD) == HELD
    replenishing = asyncio.create_task(found.pool.replenish())
    yield found
    replenishing.cancel()
    await asyncio.wait([replenishing])
    found.pool.close()


async def make(device: Device, name: bytes, size: int, owner: Owner = OPERATOR, *, pinned: bool = False, sealed: bool = True) -> Region:
    layout = pb.Layout(size=size).SerializeToString()
    private = bool(owner.namespace)
    region = await device.create(name * 32, layout, Chunks.parse(layout), owner, private=private, pinned=pinned)
    if sealed:
        device.seal(region)
    return region


def there(device: Device) -> set[bytes]:
    return {region.id[:1] for region in device.regions.values()}


async def test_a_region_that_nobody_uses_goes_for_what_is_asked(device: Device) -> None:
    for name in (b"a", b"b", b"c"):
        await make(device, name, 20 * MIB)
    device.end(device.lend(device.regions["", b"a" * 32], RED))  # used since
    await device.lend_scratch(20 * MIB, RED)
    assert there(device) == {b"a", b"c"}


async def test_an_interrupted_fill_goes_before_what_is_ready_and_what_is_pinned_or_read_stays(device: Device) -> None:
    await make(device, b"p", 8 * MIB, pinned=True)
    read = await make(device, b"r", 8 * MIB)
    device.lend(read, RED)
    await make(device, b"s", 16 * MIB)
    interrupted = await make(device, b"i", 16 * MIB, sealed=False)
    interrupted.state = State.PAUSED
    await device.lend_scratch(24 * MIB, RED)
    assert there(device) == {b"p", b"r", b"s"}
    await device.lend_scratch(16 * MIB, RED)
    assert there(device) == {b"p", b"r"}


async def test_nothing_is_evicted_where_it_would_not_be_enough(device: Device) -> None:
    await make(device, b"a", 20 * MIB)
    await make(device, b"p", 20 * MIB, pinned=True)
    await device.lend_scratch(10 * MIB, RED)
    with pytest.raises(OutOfMemory) as caught:
        await device.lend_scratch(40 * MIB, BLUE)
    assert there(device) == {b"a", b"p"}
    for part in ("41943040 bytes wanted on host", "(pinned)", "scratch of engine (pid 2, namespace red)", "gpumem reserve"):
        assert part in str(caught.value)


async def test_a_quota_is_met_by_ones_own_regions_alone(device: Device) -> None:
    device.quotas["red"] = 30 * MIB
    await make(device, b"b", 20 * MIB, BLUE)
    await make(device, b"r", 20 * MIB, RED)
    await device.lend_scratch(16 * MIB, RED)  # its own region goes
    assert there(device) == {b"b"}
    with pytest.raises(OutOfMemory, match=r"quota of namespace red on host \(31457280 bytes, 16777216 used\)"):
        await device.lend_scratch(16 * MIB, RED)
    assert device.used_by("red") == 16 * MIB


async def test_what_asks_for_spare_room_alone_has_nothing_evicted(device: Device) -> None:
    await make(device, b"a", 40 * MIB)
    with pytest.raises(OutOfMemory):
        await device.allocate(32 * MIB, "", spare=True)
    device.quotas["red"] = 16 * MIB
    await make(device, b"b", 16 * MIB, RED)
    with pytest.raises(OutOfMemory, match="quota of namespace red"):
        await device.allocate(MIB, "red", spare=True)
    assert there(device) == {b"a", b"b"}
    assert sum(slab.size for slab in await device.allocate(8 * MIB, "", spare=True)) == 8 * MIB


async def test_requests_under_way_count_against_a_quota(device: Device) -> None:
    device.quotas["red"] = 20 * MIB
    results = await asyncio.gather(*(device.lend_scratch(12 * MIB, RED) for _ in range(3)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Lease", "OutOfMemory", "OutOfMemory"]


async def test_memory_that_was_just_given_back_is_waited_for(device: Device) -> None:
    first = await device.lend_scratch(HELD, RED)
    assert isinstance(device.memory, Slow)
    device.memory.refusals = 3
    device.end(first)
    assert (await device.lend_scratch(HELD, BLUE)).size == HELD
    assert device.memory.refusals == 0


async def test_memory_that_does_not_come_back_is_said_to_be_owed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETURN_SECONDS", 0.05)
    first = await device.lend_scratch(HELD, RED)
    assert isinstance(device.memory, Slow)
    device.memory.refusals = 1 << 30
    device.end(first)
    with pytest.raises(OutOfMemory, match=f"{HELD} bytes: given back but kept by a process"):
        await device.lend_scratch(HELD, BLUE)


async def test_a_region_has_one_writer(device: Device) -> None:
    making = asyncio.create_task(make(device, b"a", 8 * MIB, sealed=False))
    await asyncio.sleep(0)
    assert device.is_busy("", b"a" * 32)
    with pytest.raises(NotSealed, match="has a writer already"):
        await make(device, b"a", 8 * MIB)
    await making
    with pytest.raises(NotSealed, match="has a writer already"):
        await make(device, b"a", 8 * MIB)
    await make(device, b"a", 8 * MIB, RED)  # another namespace's is another


async def test_who_waits_for_a_region_gets_it_when_it_is_sealed(device: Device) -> None:
    waiting = asyncio.create_task(device.wait_sealed("red", b"a" * 32, b"", 30))
    region = await make(device, b"a", 8 * MIB, sealed=False)
    await asyncio.sleep(0)
    assert not waiting.done()
    device.seal(region)
    assert await waiting is region


async def test_who_waits_in_vain_is_told_what_is_missing(device: Device) -> None:
    with pytest.raises(NotFound, match="fill it first"):
        await device.wait_sealed("", b"a" * 32, b"", 0)
    await make(device, b"a", 8 * MIB, sealed=False)
    with pytest.raises(NotSealed, match=r"0 of 8388608 bytes.*longer wait"):
        await device.wait_sealed("", b"a" * 32, b"", 0.01)
    await make(device, b"p", 8 * MIB, RED)
    with pytest.raises(NotFound, match="capability"):
        await device.wait_sealed("blue", b"p" * 32, b"", 0)


async def test_while_it_is_busy(device: Device) -> None:
    region = await make(device, b"a", 8 * MIB, sealed=False)
    waiting = asyncio.create_task(device.while_busy("", b"a" * 32))
    await asyncio.sleep(0)
    assert not waiting.done()
    region.state = State.PAUSED
    device.changed()
    await waiting


async def test_what_is_never_sealed_goes_with_its_writer(device: Device) -> None:
    region = await make(device, b"a", 8 * MIB, sealed=False)
    writing = device.lend(region, RED, writable=True)
    with pytest.raises(Forbidden, match="used by engine"):
        device.evict(region)
    device.end(writing)
    device.end(writing)  # twice does nothing
    assert there(device) == set()
    await until(lambda: device.pool.free == HELD, "all is free again")


async def test_a_region_that_somebody_can_write_is_not_sealed(device: Device) -> None:
    region = await make(device, b"a", 8 * MIB, sealed=False)
    mapped = mmap.mmap(region.slabs[0].fd, region.slabs[0].size)
    with pytest.raises(StillMapped, match="unmap it everywhere"):
        device.seal(region)
    assert region.state is State.FILLING
    mapped.close()
    device.seal(region)
    assert region.state is State.SEALED


async def test_a_smaller_device_keeps_what_is_pinned_for_last_and_what_is_used(device: Device) -> None:
    await make(device, b"p", 16 * MIB, pinned=True)
    await make(device, b"s", 16 * MIB)
    device.lend(await make(device, b"r", 16 * MIB), RED)
    assert await device.resize(32 * MIB) == 32 * MIB
    assert there(device) == {b"p", b"r"}
    assert await device.resize(0) == 16 * MIB
    assert there(device) == {b"r"}


async def test_what_was_in_use_as_the_device_became_smaller_goes_when_nobody_uses_it(device: Device) -> None:
    """As a GPU that another pod was given: what a restore was just bringing there stayed, and was lacking to that pod's engine."""
    read = device.lend(await make(device, b"r", 8 * MIB, pinned=True), RED)
    source = await make(device, b"o", 8 * MIB)
    source.readers += 1  # a fill of another device reads it
    filling, interrupted = [await make(device, name, 8 * MIB, sealed=False) for name in (b"f", b"i")]
    scratch = await device.lend_scratch(8 * MIB, RED)
    assert await device.resize(8 * MIB) == 40 * MIB
    device.pause(interrupted)
    assert there(device) == {b"r", b"o", b"f"}
    device.seal(filling)
    assert there(device) == {b"r", b"o"}
    device.let_go(source)
    assert there(device) == {b"r"}
    device.end(scratch)
    assert there(device) == {b"r"}, "it is all that is to be held"
    device.end(read)
    assert there(device) == {b"r"}
    await device.resize(0)
    assert device.pool.lent == 0


# Scratch that others join


async def test_scratch_is_joined_by_those_of_its_namespace_who_know_the_secret(device: Device) -> None:
    own = await device.lend_scratch(4 * MIB, RED, b"s" * 32)
    other = await device.join(b"s" * 32, RED, 0.0)
    assert other.slabs == own.slabs and other.writable
    assert device.used_by("red") == 4 * MIB, "counted once"
    for secret, owner in ((b"t" * 32, RED), (b"s" * 32, BLUE), (b"s" * 32, OPERATOR)):
        with pytest.raises(NotFound, match="has that secret"):
            await device.join(secret, owner, 0.0)


async def test_who_joins_waits_for_it_to_be_there(device: Device) -> None:
    joining = asyncio.create_task(device.join(b"s" * 32, RED, 10.0))
    await asyncio.sleep(0)
    own = await device.lend_scratch(4 * MIB, RED, b"s" * 32)
    assert (await joining).slabs == own.slabs


async def test_shared_scratch_goes_with_its_owner_s_lease_and_can_be_shared_anew(device: Device) -> None:
    own = await device.lend_scratch(4 * MIB, RED, b"s" * 32)
    joined = await device.join(b"s" * 32, RED, 0.0)
    with pytest.raises(Exists, match="has that secret already"):
        await device.lend_scratch(4 * MIB, RED, b"s" * 32)
    assert device.pool.lent == 4 * MIB, "what was refused is given back"
    device.end(joined)
    assert device.pool.lent == 4 * MIB, "who joined gives nothing back"
    await device.join(b"s" * 32, RED, 0.0)
    device.end(own)
    assert device.pool.lent == 0 and device.used_by("red") == 0
    with pytest.raises(NotFound):
        await device.join(b"s" * 32, RED, 0.0)
    await device.lend_scratch(4 * MIB, RED, b"s" * 32)
