"""One client's connection at the server's end: what is answered, what ends it, and that whatever it held is given back."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import socket
from collections.abc import AsyncIterator, Sequence

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.arena import Arena, ChunkSet
from gpumem.hardware.host import HostMemory
from gpumem.server.connection import Connection
from gpumem.server.device import Device
from gpumem.server.leases import Owner
from gpumem.wire.frames import VERSION, Channel, Frame
from tests.worlds.gpumem_server import MIB
from tests.worlds.processes import descriptors
from tests.worlds.waiting import until

KEY = b"k" * 32
EMPTY = pb.Layout(size=MIB).SerializeToString()


class Fills:
    """Fills that end when the test says so."""

    def __init__(self) -> None:
        self.under_way = 0
        self.go_on = asyncio.Event()

    async def fill(self, request: pb.Fill, files: list[int], owner: Owner) -> pb.Filled:
        for fd in files:
            os.close(fd)
        self.under_way += 1
        try:
            await self.go_on.wait()
        finally:
            self.under_way -= 1
        return pb.Filled(id=KEY, from_files=len(files))


class FakeBackend:
    """A server's, with one real device."""

    def __init__(self) -> None:
        self.arena = Arena(4 * MIB)
        self.filling = Fills()
        self.devices = {"host": Device(HostMemory(2 * MIB))}
        self.quotas: dict[str, int] = {}

    @property
    def host(self) -> Device:
        return self.devices["host"]

    def status(self, namespace: str | None) -> pb.Status:
        return pb.Status(devices=[pb.DeviceStatus(identity=str(namespace))])

    async def resize(self, device: Device, wanted: int) -> int:
        return await device.resize(wanted)

    def open_tenant(self, namespace: str) -> str:
        return f"/{namespace}"

    def set_quota(self, namespace: str, size: int) -> None:
        self.quotas[namespace] = size


class Peer:
    """A client that says what it likes."""

    def __init__(self, backend: FakeBackend, namespace: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(ours)
        self.served = asyncio.create_task(Connection(backend, Channel(theirs), namespace, 17).run())

    async def send(self, number: int, request: pb.Request, fds: Sequence[int] = ()) -> None:
        request.id = number
        await self.channel.send(request.SerializeToString(), fds)

    async def receive(self) -> tuple[pb.Reply, Frame]:
        frame = await self.channel.receive()
        return pb.Reply.FromString(frame.payload), frame

    async def ask(self, number: int, request: pb.Request, fds: Sequence[int] = ()) -> pb.Reply:
        await self.send(number, request, fds)
        reply, frame = await self.receive()
        frame.close()
        return reply

    async def hello(self) -> pb.Reply:
        return await self.ask(1, pb.Request(hello=pb.Hello(version=VERSION, label="peer")))

    async def refused(self) -> str:
        """The last word of a server that then hangs up."""
        reply, _ = await self.receive()
        assert not reply.id
        with pytest.raises(EOFError):
            await self.channel.receive()
        await self.served
        return reply.error.message


@pytest.fixture
async def backend() -> AsyncIterator[FakeBackend]:
    found = FakeBackend()
    await found.host.resize(16 * MIB)
    yield found
    found.host.pool.close()


@pytest.fixture
async def stranger(backend: FakeBackend) -> AsyncIterator[Peer]:
    """Who has not said hello."""
    found = Peer(backend, "")
    yield found
    found.channel.close()
    await asyncio.wait_for(found.served, 10)


@pytest.fixture
async def peer(stranger: Peer) -> Peer:
    await stranger.hello()
    return stranger


@pytest.fixture
async def tenant(backend: FakeBackend) -> AsyncIterator[Peer]:
    found = Peer(backend, "red")
    await found.hello()
    yield found
    found.channel.close()
    await asyncio.wait_for(found.served, 10)


async def test_hello_tells_the_devices(stranger: Peer) -> None:
    welcome = (await stranger.hello()).welcome
    assert (welcome.version, welcome.namespace) == (VERSION, "")
    assert [(device.identity, device.granularity) for device in welcome.devices] == [("host", 2 * MIB)]


async def test_who_does_not_say_hello_is_refused(stranger: Peer) -> None:
    await stranger.send(1, pb.Request(status=pb.GetStatus()))
    assert "not Hello" in await stranger.refused()


async def test_another_version_is_told_so(stranger: Peer) -> None:
    await stranger.send(7, pb.Request(hello=pb.Hello(version=99)))
    assert f"version 99 of gpumem's protocol and this server version {VERSION}" in await stranger.refused()


async def test_answers_come_as_they_are_ready(peer: Peer, backend: FakeBackend) -> None:
    with open(os.devnull, "rb") as file:  # noqa: ASYNC230, PTH123
        await peer.send(2, pb.Request(fill=pb.Fill()), [file.fileno()])
    assert (await peer.ask(3, pb.Request(status=pb.GetStatus()))).id == 3
    backend.filling.go_on.set()
    reply, _ = await peer.receive()
    assert (reply.id, reply.filled.from_files) == (2, 1)


async def test_requests_that_break_the_protocol_end_it(backend: FakeBackend) -> None:
    for requests, fds, why in (
        ([pb.Request(id=2, fill=pb.Fill())] * 2, [], "request 2 is still being answered"),
        ([pb.Request(id=number, fill=pb.Fill()) for number in range(2, 67)], [], "more than 64 requests"),
        ([pb.Request(id=2, status=pb.GetStatus())], [0], "descriptors with a request that takes none"),
    ):
        peer = Peer(backend, "")
        await peer.hello()
        for request in requests:
            await peer.channel.send(request.SerializeToString(), fds)
        assert why in await peer.refused()
        assert backend.filling.under_way == 0
        peer.channel.close()


async def test_a_request_that_nobody_knows_is_answered(peer: Peer) -> None:
    reply = await peer.ask(2, pb.Request())
    assert (reply.id, reply.error.reason) == (2, pb.Error.INVALID)
    assert "same zerowake on both sides" in reply.error.message


async def test_a_fault_of_the_servers_own_is_told(
    peer: Peer, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "set_quota", None)
    reply = await peer.ask(2, pb.Request(quota=pb.Quota(namespace="red")))
    assert "failed at this" in reply.error.message
    assert "Traceback" in caplog.text
    assert (await peer.ask(3, pb.Request(status=pb.GetStatus()))).HasField("status")


async def test_a_lack_of_descriptors_is_no_fault_of_the_servers(
    peer: Peer, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(namespace: str | None) -> pb.Status:
        raise OSError(errno.EMFILE, "Too many open files", "/proc/meminfo")

    monkeypatch.setattr(backend, "status", without)
    reply = await peer.ask(2, pb.Request(status=pb.GetStatus()))
    assert reply.error.message.startswith("gpumem has no descriptor left: raise its limit of open files")
    assert "no descriptor left" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.usefixtures("no_garbage")
async def test_its_end_ends_its_leases_and_stops_what_it_asked_for(backend: FakeBackend) -> None:
    before = len(descriptors(os.getpid()))
    peer = Peer(backend, "")
    await peer.hello()
    await peer.ask(2, pb.Request(scratch=pb.Scratch(device="host", size=3 * MIB)))
    await peer.ask(3, pb.Request(begin=pb.Begin(device="host", id=KEY, layout=EMPTY)))
    await peer.send(4, pb.Request(fill=pb.Fill()))
    await peer.send(5, pb.Request(attach=pb.Attach(region=pb.RegionRef(device="host", id=b"n" * 32), wait_seconds=1000)))
    await until(lambda: backend.filling.under_way, "the fill is under way")
    assert len(backend.host.leases) == 2
    peer.channel.close()
    await peer.served
    assert (backend.filling.under_way, backend.host.leases, backend.host.regions) == (0, set(), {})
    await backend.host.pool.resize(16 * MIB)
    await until(lambda: len(descriptors(os.getpid())) == before, "all its descriptors are closed")


async def test_a_lease_that_is_granted_as_it_ends_is_not_lost(backend: FakeBackend) -> None:
    for turns in range(12):
        peer = Peer(backend, "")
        await peer.hello()
        await peer.send(2, pb.Request(scratch=pb.Scratch(device="host", size=3 * MIB)))  # takes a slab apart, in a thread
        for _ in range(turns):
            await asyncio.sleep(0)
        peer.channel.close()
        await peer.served
        assert backend.host.leases == set()
        await backend.host.pool.resize(16 * MIB)


async def test_several_scratches_are_granted_by_one_request_or_none(peer: Peer, backend: FakeBackend) -> None:
    await peer.send(2, pb.Request(scratch=pb.Scratch(device="host", size=4 * MIB, more=[2 * MIB, 6 * MIB])))
    reply, frame = await peer.receive()
    granted = [reply.granted, *reply.granted.more]
    assert [sum(each.pieces) for each in granted] == [4 * MIB, 2 * MIB, 6 * MIB]
    assert len({each.lease for each in granted}) == 3 and all(each.writable for each in granted)
    sizes = [os.fstat(fd).st_size for fd in frame.descriptors]
    assert sizes == [piece for each in granted for piece in each.pieces], "the descriptors of one behind those of the other"
    frame.close()
    await peer.ask(3, pb.Request(release=pb.Release(lease=granted[1].lease)))
    assert sorted(lease.size for lease in backend.host.leases) == [4 * MIB, 6 * MIB]
    reply = await peer.ask(4, pb.Request(scratch=pb.Scratch(device="host", size=MIB, more=[MIB, 1 << 40])))
    assert reply.error.reason == pb.Error.OUT_OF_MEMORY
    assert len(backend.host.leases) == 2, "nothing of it is kept"
    assert (await peer.ask(5, pb.Request(scratch=pb.Scratch(device="host", size=MIB)))).HasField("granted")


async def test_a_fill_is_stopped_by_its_number(peer: Peer, backend: FakeBackend) -> None:
    await peer.send(2, pb.Request(fill=pb.Fill()))
    await until(lambda: backend.filling.under_way, "the fill is under way")
    await peer.send(3, pb.Request(cancel=pb.Cancel(fill=2)))
    replies = {reply.id: reply for reply, _ in [await peer.receive(), await peer.receive()]}
    assert replies[2].error.reason == pb.Error.CANCELLED
    assert replies[3].HasField("done")
    for nothing in (2, 99, 4):  # done already, never asked, itself
        assert (await peer.ask(4, pb.Request(cancel=pb.Cancel(fill=nothing)))).HasField("done")


async def test_a_writer_seals_once_and_others_then_read(peer: Peer, backend: FakeBackend) -> None:
    granted = (await peer.ask(2, pb.Request(begin=pb.Begin(device="host", id=KEY, layout=EMPTY)))).granted
    assert (granted.writable, list(granted.pieces)) == (True, [2 * MIB])
    assert (await peer.ask(3, pb.Request(seal=pb.Seal(lease=granted.lease)))).done.leases == 1
    assert "seal the lease that Begin granted" in (await peer.ask(4, pb.Request(seal=pb.Seal(lease=granted.lease)))).error.message
    wrong = await peer.ask(5, pb.Request(attach=pb.Attach(region=pb.RegionRef(device="host", id=KEY, capability=b"wrong"))))
    assert wrong.error.reason == pb.Error.NOT_FOUND
    await peer.send(6, pb.Request(attach=pb.Attach(region=pb.RegionRef(device="host", id=KEY, capability=granted.capability))))
    reply, frame = await peer.receive()
    assert (reply.granted.writable, reply.granted.layout, len(frame.descriptors)) == (False, EMPTY, 1)
    with pytest.raises(PermissionError):
        mmap.mmap(frame.descriptors[0], 4096)
    frame.close()
    assert (await peer.ask(7, pb.Request(begin=pb.Begin(device="host", id=KEY, layout=EMPTY)))).error.reason == pb.Error.EXISTS
    assert (await peer.ask(8, pb.Request(release=pb.Release()))).done.leases == 0
    assert backend.host.leases == set()


async def test_what_only_the_operator_may(tenant: Peer, backend: FakeBackend) -> None:
    for number, request in enumerate(
        (
            pb.Request(reserve=pb.Reserve(device="host", size=0)),
            pb.Request(quota=pb.Quota(namespace="red", size=0)),
            pb.Request(tenant=pb.Tenant(namespace="blue")),
        ),
        2,
    ):
        reply = await tenant.ask(number, request)
        assert reply.error.reason == pb.Error.FORBIDDEN
        assert "socket of namespace red" in reply.error.message
    assert (backend.quotas, backend.host.pool.wanted) == ({}, 16 * MIB)


async def test_what_the_operator_asks(peer: Peer, backend: FakeBackend) -> None:
    assert (await peer.ask(2, pb.Request(reserve=pb.Reserve(device="host", size=8 * MIB)))).reserved.size == 8 * MIB
    await peer.ask(3, pb.Request(quota=pb.Quota(namespace="red", size=5)))
    assert backend.quotas == {"red": 5}
    assert (await peer.ask(4, pb.Request(tenant=pb.Tenant(namespace="red")))).tenant.path == "/red"


async def test_who_sees_what(peer: Peer, tenant: Peer) -> None:
    assert (await peer.ask(2, pb.Request(status=pb.GetStatus()))).status.devices[0].identity == "None"
    assert (await tenant.ask(2, pb.Request(status=pb.GetStatus()))).status.devices[0].identity == "red"


async def test_a_tenant_pins_and_evicts_its_own_and_the_operator_anything(peer: Peer, tenant: Peer, backend: FakeBackend) -> None:
    granted = (await tenant.ask(2, pb.Request(begin=pb.Begin(device="host", id=KEY, layout=EMPTY)))).granted
    await tenant.ask(3, pb.Request(seal=pb.Seal(lease=granted.lease)))
    await tenant.ask(4, pb.Request(release=pb.Release()))
    own = pb.RegionRef(device="host", id=KEY, capability=granted.capability)
    await tenant.ask(5, pb.Request(pin=pb.Pin(region=own, pinned=True)))
    assert backend.host.regions["red", KEY].pinned
    await peer.ask(2, pb.Request(pin=pb.Pin(region=pb.RegionRef(device="host", id=KEY))))
    assert not backend.host.regions["red", KEY].pinned
    backend.host.regions["blue", KEY] = backend.host.regions.pop(("red", KEY))
    backend.host.regions["blue", KEY].namespace = "blue"
    assert (await tenant.ask(6, pb.Request(evict=pb.Evict(region=own)))).error.reason == pb.Error.FORBIDDEN
    assert (await peer.ask(3, pb.Request(evict=pb.Evict(region=pb.RegionRef(device="host", id=KEY))))).HasField("done")
    assert backend.host.regions == {}


async def test_sets_of_chunks_in_the_arena(tenant: Peer, backend: FakeBackend) -> None:
    backend.arena.add_set(("red", KEY), ChunkSet([], 0, False, []))
    ref = pb.RegionRef(id=KEY)
    await tenant.ask(2, pb.Request(pin=pb.Pin(region=ref, pinned=True)))
    assert backend.arena.sets["red", KEY].pinned
    await tenant.ask(3, pb.Request(evict=pb.Evict(region=ref)))
    assert backend.arena.sets == {}
    reply = await tenant.ask(4, pb.Request(evict=pb.Evict(region=ref)))
    assert "not on the arena" in reply.error.message


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (pb.Request(scratch=pb.Scratch(device="GPU-0", size=1)), "only of host"),
        (pb.Request(scratch=pb.Scratch(size=1)), "an unnamed device"),
        (pb.Request(scratch=pb.Scratch(device="host", size=0)), "scratch.size: 0 bytes"),
        (pb.Request(scratch=pb.Scratch(device="host", size=1 << 60)), "scratch.size"),
        (pb.Request(scratch=pb.Scratch(device="host", size=1, more=[1, 0])), "scratch.size: 0 bytes"),
        (pb.Request(scratch=pb.Scratch(device="host", size=1, more=[1] * 256)), "scratch.more: 257 at once"),
        (pb.Request(scratch=pb.Scratch(device="host", size=1, secrets=[b"short"])), "scratch.secrets: there is one of 32 bytes"),
        (pb.Request(scratch=pb.Scratch(device="host", size=1, secrets=[b"", b""])), "scratch.secrets: there is one of 32 bytes"),
        (pb.Request(join=pb.Join(device="GPU-0", secret=b"s" * 32)), "only of host"),
        (pb.Request(join=pb.Join(device="host", secret=b"s")), "an id of 1 bytes"),
        (pb.Request(reserve=pb.Reserve(device="host", size=1 << 60)), "reserve.size"),
        (pb.Request(attach=pb.Attach(region=pb.RegionRef(device="host", id=b"short"))), "an id of 5 bytes"),
        (pb.Request(begin=pb.Begin(device="host", id=KEY, layout=b"\xff")), "layout"),
        (pb.Request(release=pb.Release(lease=999)), "no lease 999"),
        (pb.Request(evict=pb.Evict(region=pb.RegionRef(device="host", id=KEY))), "see `gpumem status`"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(peer: Peer, request_: pb.Request, what: str) -> None:
    assert what in (await peer.ask(2, request_)).error.message
