"""A fleet that fetches one snapshot: what is read from the origin, and what happens where a member fails."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.cascade import Cascade, Waits
from restore_agent.transfer.offers import Offered
from restore_agent.transfer.peer import Peer, Peers
from restore_agent.transfer.source import Altered, Piece, Source
from tests.worlds.certificates import Authority
from tests.worlds.peers import DIGEST, NAMESPACE, Served, fleet_files, make_chunks, offered, served
from tests.worlds.waiting import until
from zerowake_shared.tls import TlsFiles, client_contexts

FLEET = Authority("fleet")
SIZE = 50_000
PATIENT = Waits(root=60.0, arrival=20.0, member=60.0)  # eight agents in one process are slow beside other tests
HASTY = Waits(root=1.5, arrival=20.0, member=60.0)


class Origin:
    """A folder of chunks that counts how often each was read. `gate`: nothing is answered before it is set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reads: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()

    def __str__(self) -> str:
        return "the origin"

    async def read(self, key: str, offset: int, length: int) -> AsyncIterator[Piece]:
        await self.gate.wait()
        self.reads[key] += 1
        yield (self.folder / Path(key).name).read_bytes()[offset : offset + length]

    async def size(self, key: str) -> int:
        return (self.folder / Path(key).name).stat().st_size


class Member:
    """An agent of the fleet: what it has, and its server."""

    def __init__(self, name: str, folder: Path, chunks: Sequence[Chunk], there: Served, peers: Peers, here: Offered) -> None:
        self.name = name
        self.folder = folder
        self.there = there
        self.peers = peers
        self._chunks = chunks
        self._here = here

    def has_all(self) -> bool:
        return all(blake3((self.folder / chunk.hash).read_bytes()).hexdigest() == chunk.hash for chunk in self._chunks)

    def lie(self) -> None:
        """It serves other bytes under the name of every chunk."""
        (self.folder / "lies").write_bytes(b"\0" * SIZE)
        for chunk in self._chunks:
            self._here.arrived(chunk, self.folder / "lies")

    async def fetch(
        self, members: Sequence["Member"], origins: Sequence[Source], holders: Sequence["Member"] = (), waits: Waits = PATIENT
    ) -> None:
        def peer(of: Member) -> Callable[[float], Peer]:
            return lambda patience: self.peers.peer(of.there.address, NAMESPACE, DIGEST, patience)

        others = {other.name: peer(other) for other in members if other is not self}
        cascade = Cascade(self.name, others, {holder.name: peer(holder)(0.0) for holder in holders}, origins, waits)
        await cascade.bring_all(self._chunks, self._keep, lambda chunk: self._here.arrived(chunk, self.folder / chunk.hash))

    def _keep(self, chunk: Chunk, data: memoryview) -> None:
        fresh = self.folder / f"{chunk.hash}.{threading.get_ident()}"
        fresh.write_bytes(data)
        fresh.rename(self.folder / chunk.hash)


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return fleet_files(tmp_path / "tls", FLEET)


@contextlib.contextmanager
def fleet(folder: Path, tls: TlsFiles, chunks: Sequence[Chunk], count: int, **bounds: float) -> Iterator[list[Member]]:
    with contextlib.ExitStack() as stack:
        members = []
        for number in range(count):
            (home := folder / f"node-{number}").mkdir(parents=True)
            here = offered(home, chunks)
            there = stack.enter_context(served(tls, here, **bounds))  # type: ignore[arg-type]
            members.append(Member(home.name, home, chunks, there, stack.enter_context(Peers(client_contexts(tls))), here))
        yield members


@pytest.fixture
def chunks(tmp_path: Path) -> list[Chunk]:
    return make_chunks(tmp_path / "origin", 48, SIZE)


@pytest.fixture
def origin(tmp_path: Path, chunks: list[Chunk]) -> Origin:
    return Origin(tmp_path / "origin")


async def test_eight_read_each_chunk_from_the_origin_once(tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin) -> None:
    with fleet(tmp_path, tls, chunks, 8) as members:
        await asyncio.gather(*(member.fetch(members, [origin]) for member in members))
        assert all(member.has_all() for member in members)
    assert len(origin.reads) == len(chunks)
    assert sum(origin.reads.values()) <= 1.1 * len(chunks)


async def test_one_alone_reads_all(tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin) -> None:
    with fleet(tmp_path, tls, chunks, 1) as [member]:
        await member.fetch([member], [origin])
        assert member.has_all()
    assert sum(origin.reads.values()) == len(chunks)


async def test_who_has_it_is_asked_before_the_origin(tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin) -> None:
    with fleet(tmp_path, tls, chunks, 4) as [holder, *members]:
        await holder.fetch([holder], [origin])
        origin.reads.clear()
        await asyncio.gather(*(member.fetch(members, [origin], [holder]) for member in members))
        assert all(member.has_all() for member in members)
        assert holder.there.egress.sent == len(chunks) * SIZE
    assert not origin.reads


async def test_who_comes_later_takes_what_the_others_have_read(tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin) -> None:
    """The first did not find the last, and read its share. Of three, the last finds them all by asking two."""
    with fleet(tmp_path, tls, chunks, 3) as [*early, late]:
        with late.there.offers.on_its_way(offered(tmp_path / "nowhere", [])):  # its agent is there, and has not begun
            await asyncio.gather(*(member.fetch([*early, late], [origin]) for member in early))
        assert sum(origin.reads.values()) <= 1.1 * len(chunks)
        await late.fetch([*early, late], [origin])
        assert late.has_all()
    assert sum(origin.reads.values()) <= 1.1 * len(chunks)


async def test_one_that_dies_in_the_middle_costs_its_share_once_more_at_most(
    tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin
) -> None:
    with fleet(tmp_path, tls, chunks, 4) as [dies, *rest]:
        members = [dies, *rest]
        first = asyncio.create_task(dies.fetch(members, [origin]))
        others = [asyncio.create_task(member.fetch(members, [origin])) for member in rest]
        await until(lambda: any(dies.folder.iterdir()), "its first chunk")
        await asyncio.to_thread(dies.there.server._close)
        first.cancel()
        await asyncio.gather(*others)
        assert all(member.has_all() for member in rest)
    assert sum(origin.reads.values()) <= 1.5 * len(chunks)  # 1.75 where each reads for itself what the dead one has not


async def test_one_that_was_never_there_has_its_share_read_by_one_other(
    tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin
) -> None:
    with fleet(tmp_path, tls, chunks, 5) as [gone, *rest]:
        await asyncio.to_thread(gone.there.server._close)
        await asyncio.gather(*(member.fetch([gone, *rest], [origin]) for member in rest))
        assert all(member.has_all() for member in rest)
    assert sum(origin.reads.values()) <= 1.1 * len(chunks)


async def test_one_that_serves_other_bytes_is_believed_by_nobody(
    tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin
) -> None:
    with fleet(tmp_path, tls, chunks, 4) as [liar, *members]:
        liar.lie()
        await asyncio.gather(*(member.fetch([liar, *members], [origin]) for member in members))
        assert all(member.has_all() for member in members)
    assert sum(origin.reads.values()) <= 1.1 * len(chunks)


async def test_where_all_lie_nothing_is_kept(tmp_path: Path, tls: TlsFiles, chunks: list[Chunk]) -> None:
    with fleet(tmp_path, tls, chunks, 2) as [liar, member]:
        liar.lie()
        with pytest.raises(Altered, match=f"agent {liar.there.address} has other bytes under the name of"):
            await member.fetch([member], [], [liar])
        assert not list(member.folder.iterdir())


async def test_one_that_is_slow_is_left(tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin) -> None:
    """It has everything, and gives a byte a second."""
    with fleet(tmp_path, tls, chunks, 1, rate=1.0) as [slow], fleet(tmp_path / "fast", tls, chunks, 3) as members:
        await slow.fetch([slow], [origin])
        origin.reads.clear()
        await asyncio.gather(*(member.fetch(members, [origin], [slow], HASTY) for member in members))
        assert all(member.has_all() for member in members)
    assert sum(origin.reads.values()) <= len(chunks)


async def test_the_origin_may_go_once_each_chunk_was_read(tmp_path: Path, tls: TlsFiles, chunks: list[Chunk], origin: Origin) -> None:
    with fleet(tmp_path, tls, chunks, 3) as [one, other, third]:
        await asyncio.gather(one.fetch([one, other], [origin]), other.fetch([one, other], [origin]))
        await third.fetch([one, other, third], [])
        assert third.has_all()
