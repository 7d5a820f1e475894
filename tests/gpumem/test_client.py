"""A client: shared weights, private memory, and the way through a snapshot."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client, Joined, Scratch
from gpumem.hardware.memory import MemoryFailed
from gpumem.wire.blocking_connection import BlockingConnection
from gpumem.wire.errors import (
    Exists,
    Invalid,
    NotFound,
    NotSealed,
    OutOfMemory,
    PeerGone,
    StillMapped,
    WrongDevice,
)
from tests.worlds.gpumem_peer import go_on, peer, step
from tests.worlds.gpumem_server import MIB, Served, Weights, until


def ours() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:gpumem" in line]


def opened() -> list[str]:
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found.append(str(file.readlink()))
    return [name for name in found if "gpumem" in name]


def test_what_is_filled_is_what_is_read(client: Client, weights: Weights) -> None:
    filled = client.fill(weights.layout, weights.sources)
    assert (filled.id, filled.from_files) == (weights.id, len(weights.data))
    with client.attach(weights.id) as region:
        assert region.size == len(weights.data)
        assert region.view() == weights.data
        assert region.view().readonly


def test_the_same_bytes_are_there_once(server: Served, client: Client, weights: Weights) -> None:
    client.fill(weights.layout, weights.sources)
    with Client(server.socket) as other:
        again = other.fill(weights.layout, [])
        assert again.there_before == len(weights.data)
        assert other.attach(weights.id).view() == client.attach(weights.id).view()
        assert server.host.regions_bytes < len(weights.data) + 2 * MIB
        assert server.status().regions[0].leases == 2


def test_a_resume_on_a_gpu_that_is_not_there_changes_nothing(client: Client, weights: Weights) -> None:
    client.fill(weights.layout, weights.sources)
    region, scratch = client.attach(weights.id), client.scratch(MIB)
    client.quiesce()
    with pytest.raises(WrongDevice, match="GPU-elsewhere"):
        client.resume(moved={client.device: "GPU-elsewhere"})
    assert ours() == []
    assert {client.device, region.device, scratch.device} == {"host"}
    client.resume(moved={"GPU-another": "GPU-elsewhere"})
    assert region.view() == weights.data


def test_a_snapshot_finds_nothing_mapped_and_the_replica_everything_where_it_was(client: Client, server: Served, weights: Weights) -> None:
    others = opened()  # what other tests of this process have left open
    client.fill(weights.layout, weights.sources)
    region, scratch = client.attach(weights.id), client.scratch(5 * MIB)
    before = region.address, scratch.address
    scratch.view()[:] = b"k" * scratch.size
    client.quiesce()
    client.quiesce()
    assert not ours()
    assert opened() == others
    assert not server.status().leases
    with pytest.raises(Invalid, match="resume"):
        region.view()
    with pytest.raises(PeerGone, match="resume"):
        client.attach(weights.id)
    client.resume()
    client.resume()
    assert (region.address, scratch.address) == before
    assert region.view() == weights.data
    assert not any(scratch.view())


@pytest.mark.parametrize("grants", ["all at once", "one at a time"])
def test_a_resume_asks_once_for_all_scratch(
    client: Client, server: Served, weights: Weights, monkeypatch: pytest.MonkeyPatch, grants: str
) -> None:
    """And as often as it takes of a server of before, which knows of one at a time."""
    client.fill(weights.layout, weights.sources)
    scratches = [client.scratch(2 * MIB)]
    region = client.attach(weights.id)
    scratches += [client.scratch(size * MIB) for size in (4, 2, 6)]
    before = [scratch.address for scratch in scratches]
    asked: list[str] = []
    ask = BlockingConnection.ask

    def counted(connection: BlockingConnection, request: pb.Request, *rest: Any, **named: Any) -> Any:
        asked.append(str(request.WhichOneof("request")))
        if grants == "one at a time" and request.HasField("scratch"):
            request.scratch.ClearField("more")
        return ask(connection, request, *rest, **named)

    client.quiesce()
    monkeypatch.setattr(BlockingConnection, "ask", counted)
    client.resume()
    assert asked == ["hello", "attach"] + ["scratch"] * (1 if grants == "all at once" else 4)
    assert [scratch.address for scratch in scratches] == before
    for number, scratch in enumerate(scratches, 1):
        assert not any(scratch.view())
        scratch.view()[:] = bytes([number]) * scratch.size
    assert [set(scratch.view()) for scratch in scratches] == [{1}, {2}, {3}, {4}], "each its own"
    assert region.view() == weights.data
    scratches[1].close()
    assert sorted(lease.size for lease in server.status().leases if not lease.region) == [2 * MIB, 2 * MIB, 6 * MIB]


def test_resume_waits_for_a_region_that_is_being_filled(client: Client, server: Served, weights: Weights) -> None:
    """And has its scratch by then."""
    client.fill(weights.layout, weights.sources)
    region = client.attach(weights.id)
    client.scratch(2 * MIB)
    client.quiesce()
    connection = BlockingConnection(server.socket, "test")
    connection.ask(pb.Request(evict=pb.Evict(region=weights.ref())))
    connection.close()
    with pytest.raises(NotFound, match="fill it first"):
        client.resume(wait=0.05)
    assert not ours()
    resuming = threading.Thread(target=client.resume)
    resuming.start()
    until(lambda: [lease.size for lease in server.status().leases] == [2 * MIB])
    with Client(server.socket) as other:
        other.fill(weights.layout, weights.sources)
    resuming.join(10)
    assert region.view() == weights.data


def test_a_writer_seals_and_then_nobody_writes(client: Client, server: Served) -> None:
    key = os.urandom(32)
    region = client.begin(key, pb.Layout(size=3 * MIB + 5, note=b"mine"))
    with Client(server.socket) as other:
        with pytest.raises(NotSealed):
            other.begin(key, pb.Layout(size=5))
        with pytest.raises(NotSealed, match="longer wait"):
            other.attach(key, region.capability)
        with pytest.raises(Invalid, match="seal or close"):
            client.quiesce()
        address = region.address
        region.view()[:] = b"w" * region.size
        region.seal()
        assert region.address == address
        assert not region.writable
        assert bytes(region.view()) == b"w" * region.size
        with pytest.raises(Exists):
            other.begin(key, pb.Layout(size=5))
        found = other.attach(key, region.capability)
        assert found.layout.note == b"mine"
        assert found.view() == region.view()
        client.quiesce()
        client.resume()
        assert found.view() == region.view()


def test_sealed_memory_cannot_be_written_whatever_a_process_does(client: Client, server: Served, weights: Weights) -> None:
    client.fill(weights.layout, weights.sources)
    connection = BlockingConnection(server.socket, "thief")
    _, frame = connection.ask(pb.Request(attach=pb.Attach(region=weights.ref())))
    for fd in [frame.descriptors[0], os.open(f"/proc/self/fd/{frame.descriptors[0]}", os.O_RDWR)]:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    frame.close()
    connection.close()


def test_a_region_is_not_sealed_while_somebody_can_write(client: Client, server: Served) -> None:
    connection = BlockingConnection(server.socket, "writer")
    granted, frame = connection.ask(
        pb.Request(begin=pb.Begin(device="host", id=b"w" * 32, layout=pb.Layout(size=2 * MIB).SerializeToString()))
    )
    mapped = mmap.mmap(frame.descriptors[0], 2 * MIB)
    with pytest.raises(StillMapped, match="unmap it everywhere"):
        connection.ask(pb.Request(seal=pb.Seal(lease=granted.granted.lease)))
    mapped.close()
    connection.ask(pb.Request(seal=pb.Seal(lease=granted.granted.lease)))
    frame.close()
    connection.close()


def test_a_private_region_needs_its_capability(client: Client, server: Served) -> None:
    region = client.begin(b"p" * 32, pb.Layout(size=100))
    region.seal()
    with Client(server.socket) as other:
        for wrong in (b"", b"x" * 16, region.capability[:-1]):
            with pytest.raises(NotFound, match="capability"):
                other.attach(b"p" * 32, wrong)
        assert other.attach(b"p" * 32, region.capability).size == 100


def test_a_forgotten_mapping_is_found(client: Client) -> None:
    scratch = client.scratch(MIB)
    kept, scratch._mapped[0].close = scratch._mapped[0].close, lambda: None  # type: ignore[method-assign]
    with pytest.raises(StillMapped, match=f"{scratch.address:#x}"):
        client.quiesce()
    kept()


@pytest.mark.parametrize("how", ["released", "killed"])
def test_no_byte_of_ones_scratch_is_readable_by_the_next(server: Served, how: str) -> None:
    everything = server.host.wanted_bytes
    with peer(server.socket, "scratch", str(everything), "171") as first:
        step(first)
        assert go_on(first) == "lent clean"
        assert go_on(first) == "written"
        if how == "released":
            assert go_on(first) == "quiesced"
        else:
            first.kill()
        until(lambda: not server.status().leases)
        with peer(server.socket, "scratch", str(everything), "1") as second:
            step(second)
            assert go_on(second) == "lent clean"


def test_who_kept_a_mapping_sees_nothing_of_the_next_owner(server: Served) -> None:
    everything = server.host.wanted_bytes
    connection = BlockingConnection(server.socket, "spy")
    _, frame = connection.ask(pb.Request(scratch=pb.Scratch(device="host", size=everything)))
    spies = [mmap.mmap(fd, 2 * MIB) for fd in frame.descriptors]
    connection.close()
    with Client(server.socket) as owner:
        view = owner.scratch(everything).view()
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(view)), 0xAB, len(view))
        assert not any(any(spy[:4096]) for spy in spies)
        del view
    for spy in spies:
        spy.close()
    frame.close()


def test_out_of_memory_names_what_holds_it(client: Client, server: Served, weights: Weights) -> None:
    client.fill(weights.layout, weights.sources)
    client.attach(weights.id)
    client.scratch(100 * MIB)
    with Client(server.socket) as other, pytest.raises(OutOfMemory) as caught:
        other.scratch(150 * MIB)
    for part in ("scratch of test (pid", weights.id.hex()[:12], "used by test", "gpumem reserve"):
        assert part in str(caught.value)


def test_errors_name_the_remedy(server: Served, client: Client) -> None:
    with pytest.raises(WrongDevice, match="there are host"):
        Client(server.socket, device="GPU-0")
    with pytest.raises(PeerGone, match="gpumem serve"):
        Client(server.socket.with_name("nobody"))
    with pytest.raises(Invalid, match="32"):
        client.attach(b"short")
    with pytest.raises(Invalid, match="layout"):
        client.begin(b"i" * 32, b"\xff\xff\xff")
    with pytest.raises(NotFound, match="lease 999"):
        client._connection.ask(pb.Request(release=pb.Release(lease=999)))


def test_what_cannot_be_mapped_is_given_back(client: Client, server: Served) -> None:
    """Here the process has no more room for addresses; its other leases stay."""
    kept = client.scratch(2 * MIB)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 * MIB, limits[1]))
    try:
        with pytest.raises(MemoryFailed, match="mmap"):
            client.scratch(100 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    kept.view()[:4] = b"kept"
    assert [lease.size for lease in server.status().leases] == [2 * MIB]


# Memory that processes of one engine share


@pytest.fixture
def ranks(server: Served) -> Iterator[tuple[Client, Client]]:
    with Client(server.socket, label="rank 0") as one, Client(server.socket, label="rank 1") as two:
        for rank in (one, two):
            rank.meet(b"first meeting")
        yield one, two


def joined(one: Client, two: Client) -> tuple[Scratch, Scratch, Joined, Joined]:
    """Each rank's own, and each rank's view of the other's."""
    own = one.scratch(2 * MIB, "rank 0"), two.scratch(4 * MIB, "rank 1")
    return *own, one.join("rank 1", "host"), two.join("rank 0", "host")


def test_ranks_write_into_each_other_s_memory(ranks: tuple[Client, Client], server: Served) -> None:
    mine, theirs, far, near = joined(*ranks)
    mine.view()[:5] = b"hello"
    assert near.view()[:5] == b"hello"
    far.view()[-5:] = b"there"
    assert theirs.view()[-5:] == b"there"
    assert server.host.scratch_bytes == 6 * MIB, "what is joined is counted once"
    assert sorted(lease.joined for lease in server.status().leases) == [False, False, True, True]


def test_after_a_resume_they_meet_again_at_the_same_addresses(ranks: tuple[Client, Client], server: Served) -> None:
    mine, theirs, far, near = joined(*ranks)
    before = [found.address for found in (mine, theirs, far, near)]
    mine.view()[:5] = b"hello"
    for rank in ranks:
        rank.quiesce()
    assert ours() == [] and not server.status().leases
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda rank: rank.resume(meeting=b"second meeting"), ranks))
    assert [found.address for found in (mine, theirs, far, near)] == before
    assert not any(near.view()), "it is new memory"
    theirs.view()[:5] = b"again"
    assert far.view()[:5] == b"again"


def test_two_engines_of_one_image_do_not_meet(ranks: tuple[Client, Client], server: Served) -> None:
    """They know the same names; each has a meeting of its own."""
    joined(*ranks)
    with Client(server.socket, label="another rank 1") as stranger:
        stranger.meet(b"another meeting")
        with pytest.raises(NotFound, match="has that secret"):
            stranger.join("rank 0", "host", wait=0.05)
        own = stranger.scratch(6 * MIB, "rank 0")
        assert stranger.join("rank 0", "host", wait=0.05).mapped_size == own.mapped_size == 6 * MIB


def test_what_is_shared_is_resumed_in_another_meeting_only(ranks: tuple[Client, Client]) -> None:
    one, _ = ranks
    mine = one.scratch(MIB, "rank 0")
    with pytest.raises(Exists, match="has that secret already"):
        one.scratch(MIB, "rank 0")
    one.quiesce()
    for meeting in (b"", b"first meeting"):
        with pytest.raises(Invalid, match="with a new meeting"):
            one.resume(meeting=meeting)
    one.resume(meeting=b"second meeting")
    mine.view()[:1] = b"x"


def test_memory_cannot_be_shared_before_there_is_a_meeting(server: Served) -> None:
    with Client(server.socket) as alone, pytest.raises(Invalid, match=r"before there is a meeting: call meet"):
        alone.scratch(MIB, "rank 0")


def test_a_rank_that_ends_takes_nothing_from_the_others(ranks: tuple[Client, Client], server: Served) -> None:
    mine, _, _, near = joined(*ranks)
    mine.view()[:5] = b"still"
    ranks[0].close()
    assert near.view()[:5] == b"still", "who has mapped it keeps it"
    ranks[1].close()
    until(lambda: not server.status().leases and server.host.free_bytes + server.host.regions_bytes >= server.host.wanted_bytes)


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(ranks: tuple[Client, Client]) -> None:
    one, two = ranks
    joined(one, two)
    for rank in ranks:
        rank.quiesce()
    with pytest.raises(NotFound, match=r"after 0\.1 s"):
        one.resume(wait=0.1, meeting=b"second meeting")
    assert ours() == []
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda rank: rank.resume(meeting=b"third meeting"), ranks))
