"""Nodes that trust each other, and a snapshot with pages, small files and weights that can go from one to the other."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

from blake3 import blake3
from zerowake_proto import gpumem_pb2

from restore_agent.sequences.offering import Offering
from restore_agent.sequences.travel import Travel
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.manifest import PartRecord, WeightsRecord, layout_file
from restore_agent.snapshots.names import SeenNames
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import Store
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.egress import Egress
from restore_agent.transfer.exchange import Exchange, OtherAgent
from restore_agent.transfer.offers import Offers
from restore_agent.transfer.peer import Peers
from restore_agent.transfer.peer_server import PeerServer
from restore_agent.transfer.publish import Publisher
from restore_agent.transfer.source import Denied, Piece
from tests.worlds.snapshots import draft
from tests.worlds.waiting import until
from zerowake_shared.tls import TlsFiles, client_contexts, server_context

CONTENT = random.Random(8).randbytes(2560 * PAGE)  # three chunks
WEIGHTS = random.Random(9).randbytes(300_000)
HEADER = 100  # bytes of the file before its weights
_CHUNK = 100_000


@contextlib.contextmanager
def node(folder: Path, *trusts: Store) -> Iterator[Store]:
    """A node's store; it takes what those have signed for true."""
    store = Store(folder)
    try:
        for other in trusts:
            public = other.keyring.public_file(other.keyring.signing)
            assert public is not None
            store.keyring.trust(public.read_bytes())
        yield store
    finally:
        store.close()


def take(store: Store, model: Path, content: bytes = CONTENT, name: str = "small", **fields: object) -> Snapshot:
    """A snapshot of an engine whose weights are in a folder `model`, which is made."""
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_bytes(b"h" * HEADER + WEIGHTS)
    pieces = [WEIGHTS[at : at + _CHUNK] for at in range(0, len(WEIGHTS), _CHUNK)]
    layout = gpumem_pb2.Layout(size=len(WEIGHTS) + 4096)
    layout.chunks.extend(gpumem_pb2.Chunk(hash=blake3(piece).digest(), size=len(piece)) for piece in pieces)
    data = layout.SerializeToString(deterministic=True)
    part = PartRecord(path="model.safetensors", offset=HEADER, first_chunk=0, chunks=len(pieces))
    record = WeightsRecord(region=blake3(data).hexdigest(), size=layout.size, parts=(part,), folder=str(model))
    workspace = store.workspace()
    path = workspace / layout_file(record)
    path.parent.mkdir()
    path.write_bytes(data)
    with store.chunks.lease() as lease:
        return store.publish(workspace, draft(lease, workspace, content, name, weights=(record,), **fields), lease, replace=True)


class Watched(Directory):
    """A folder that tells what is read of it, and refuses one object once something holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[str] = []
        self.refused = ""
        self.once: Callable[[], object] = lambda: True

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        self.reads.append(key)
        if key == self.refused:
            await until(self.once)
            raise Denied("the key was withdrawn")
        async for piece in super().read(key, offset, length):
            yield piece


async def published(origin: Store, remote: Directory, folder: Path, content: bytes = CONTENT, *, keep_model: bool = False) -> Snapshot:
    """A snapshot of a model in `folder`/model, which is gone again unless it is kept."""
    snapshot = take(origin, folder / "model", content)
    await Publisher(origin, SeenNames(origin.state), remote).publish(snapshot)
    if not keep_model:
        shutil.rmtree(folder / "model")
    return snapshot


@contextlib.contextmanager
def sharing(store: Store, name: str, tls: TlsFiles) -> Iterator[tuple[Travel, OtherAgent]]:
    """A node that exchanges snapshots with others; and how it is named to them, as one that has what they want."""

    def in_memory(digest: str, chunk_hash: str) -> None:
        """Nothing is staged."""

    travel = Travel(store, lambda snapshot: None)
    offers = Offers(Offering(store, in_memory))
    with (
        Peers(client_contexts(tls)) as peers,
        PeerServer.listening("127.0.0.1:0", server_context(tls), offers, Egress(1e12, 32)) as server,
    ):
        travel.exchange = Exchange(name, offers, peers, server.port)
        yield travel, OtherAgent(name, f"127.0.0.1:{server.port}", complete=True)
