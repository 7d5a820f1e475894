"""Agents that serve chunks to each other, in this process: their certificates, a snapshot of random chunks, and servers of it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.egress import Egress
from restore_agent.transfer.layout import chunk_key
from restore_agent.transfer.offers import Offered, Offers
from restore_agent.transfer.peer_server import AGENT, PeerServer
from restore_agent.transfer.source import Source
from tests.worlds.certificates import Authority
from zerowake_shared.tls import TlsFiles, server_context

NAMESPACE = "team"
DIGEST = "5eed" * 16
MANIFEST, SIGNATURE = b'{"a": "manifest"}\n', b'{"a": "signature"}\n'
FAST = 1e12  # bytes a second: no bound that a test could meet


def fleet_files(folder: Path, authority: Authority, name: str = AGENT) -> TlsFiles:
    """An agent's certificate, its key and its fleet's authority, as files."""
    folder.mkdir(exist_ok=True, parents=True)
    certificate, key = authority.issue(name).write(folder, "tls")
    (folder / "ca.crt").write_bytes(authority.certificate)
    return TlsFiles(certificate, key, folder / "ca.crt")


def make_chunks(folder: Path, count: int = 8, size: int = 100_000) -> list[Chunk]:
    """Random ones, as files named by their hashes."""
    folder.mkdir(exist_ok=True, parents=True)
    made = []
    for _ in range(count):
        data = os.urandom(size)
        chunk = Chunk(blake3(data).hexdigest(), size)
        (folder / chunk.hash).write_bytes(data)
        made.append(chunk)
    return made


def offered(folder: Path, chunks: Sequence[Chunk], namespace: str = NAMESPACE, digest: str = DIGEST) -> Offered:
    """Those chunks as a snapshot, of which those are here that the folder holds."""

    one = Offered(namespace, digest, MANIFEST, SIGNATURE, chunks)
    for chunk in chunks:
        if (folder / chunk.hash).exists():
            one.arrived(chunk, folder / chunk.hash)
    return one


@dataclass
class Served:
    """A server under test, and what it offers."""

    server: PeerServer
    offers: Offers
    egress: Egress

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@contextlib.contextmanager
def served(tls: TlsFiles, *here: Offered, rate: float = FAST, streams: int = 32) -> Iterator[Served]:
    """Those snapshots, on a free port."""
    by_digest = {each.digest: each for each in here}
    offers, egress = Offers(by_digest.get), Egress(rate, streams)
    with PeerServer.listening("127.0.0.1:0", server_context(tls), offers, egress) as server:
        yield Served(server, offers, egress)


async def read(source: Source, chunk: Chunk) -> bytes:
    """All of a chunk, as it comes."""
    return await read_key(source, chunk_key(chunk.hash), chunk.size)


async def read_key(source: Source, key: str, length: int = 1 << 20, offset: int = 0) -> bytes:
    return b"".join([bytes(piece) async for piece in source.read(key, offset, length)])
