"""Eight agents, each a process, fetch one snapshot from an origin that sends 200 MB/s; beside eight who do not know of each other.

Half of them keep what they fetch on the disk and half in memory, so that no machine has to have room for all of it in one of the two. All
is verified by who reads it. Then one reads from another alone, with TLS and without, from memory: what a link between two could carry here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from restore_agent.snapshots.chunks import Chunk, ChunkStore
from restore_agent.transfer.egress import Egress
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.offers import Offered, Offers
from restore_agent.transfer.peer import Peers
from restore_agent.transfer.peer_server import AGENT, PeerServer
from tests.bench.figures import Figure
from tests.worlds.certificates import Authority
from tests.worlds.fleet_agent import ROOT, FleetAgent, fleet_agent, random_chunks
from tests.worlds.peers import DIGEST, FAST, MANIFEST, NAMESPACE, SIGNATURE, fleet_files
from zerowake_shared.tls import TlsFiles, client_contexts, server_context

AGENTS = 8
SIZE = 2 << 30
ORIGIN_RATE = 200e6  # bytes a second
STREAMS = 4  # of one reader who reads from one
ROUNDS = 5
_SPARE = 4 << 30
_MEMORY = Path("/dev/shm")


def unavailable() -> str:
    half = AGENTS // 2 * SIZE
    for folder, needed in ((Path(tempfile.gettempdir()), half + _SPARE), (_MEMORY, half + SIZE + _SPARE)):
        if shutil.disk_usage(folder).free < needed:
            return f"{folder} has less than {needed >> 30} GiB free"
    return ""


async def main() -> list[Figure]:
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir=_MEMORY) as memory:
        fleet_files(Path(disk) / "tls", Authority("fleet"))
        chunks = random_chunks(Path(memory) / "origin", SIZE)
        return [*await fleet(Path(disk), Path(memory), chunks), *await links(Path(disk) / "tls", Path(memory) / "origin", chunks)]


async def fleet(disk: Path, memory: Path, chunks: list[Chunk]) -> list[Figure]:
    async with contextlib.AsyncExitStack() as stack:

        async def agent(name: str, folder: Path, rate: float, *options: str) -> FleetAgent:
            return await stack.enter_async_context(fleet_agent(name, folder, disk / "tls", chunks, rate, *options))

        origin = await agent("origin", memory / "origin", ORIGIN_RATE, "--whole")
        agents = [await agent(f"node-{number}", (disk, memory)[number % 2] / f"node-{number}", FAST) for number in range(AGENTS)]
        together = await asyncio.gather(*(each.fetch(agents, origin) for each in agents))
        read = await origin.sent() / SIZE
        await asyncio.gather(*(each.forget() for each in agents))
        before = await origin.sent()
        apart = await asyncio.gather(*(each.fetch([each], origin) for each in agents))
        read_apart = (await origin.sent() - before) / SIZE
        await asyncio.gather(*(each.forget() for each in agents))
    first, last, ideal = min(together), max(together), SIZE / ORIGIN_RATE
    detail = f"{AGENTS} processes, {SIZE >> 30} GiB, an origin of {ORIGIN_RATE / 1e6:.0f} MB/s, which alone takes {ideal:.1f} s"
    return [
        Figure("a fleet fetches a snapshot: read from the origin", read, "× the snapshot", at_most=1.1, detail=detail),
        Figure("the last agent has it", last, "s", detail=f"the first after {first:.1f} s"),
        Figure("the last agent ÷ the first", last / first, "×", at_most=1.5),
        Figure("each for itself: read from the origin", read_apart, "× the snapshot"),
        Figure("each for itself: the last agent has it", max(apart), "s", detail=f"the first after {min(apart):.1f} s"),
        Figure("each for itself ÷ the fleet, the last agent", max(apart) / last, "×"),
    ]


async def links(tls: Path, folder: Path, chunks: list[Chunk]) -> list[Figure]:
    """One process serves, this one reads and verifies, into memory that it uses again; with and without TLS, in turn."""
    rates: dict[str, list[float]] = {"tls": [], "plain": []}
    costs: dict[str, list[float]] = {"tls": [], "plain": []}
    for _ in range(ROUNDS):
        for way in ("tls", "plain"):
            command = [sys.executable, "-m", "tests.bench.fleet", way, str(tls), str(folder)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as server:
                assert server.stdout and server.stdin
                port = int(server.stdout.readline())
                both = (os.getpid(), server.pid)
                before = sum(map(_processor, both))
                seconds = await _read(f"127.0.0.1:{port}", way, TlsFiles.in_folder(tls), chunks)
                costs[way].append((sum(map(_processor, both)) - before) / (SIZE / 1e9))
                server.stdin.close()
            rates[way].append(SIZE / seconds / 1e9)
    rate, plain = (statistics.median(rates[way]) for way in rates)
    cost, plain_cost = (statistics.median(costs[way]) for way in costs)
    return [
        Figure("one agent reads from another over loopback, verified", rate, "GB/s", at_least=1.0, detail=spread(rates["tls"])),
        Figure("the same without TLS", plain, "GB/s", detail=spread(rates["plain"])),
        Figure("processor time of both ends", cost, "s/GB", detail=f"without TLS {plain_cost:.2f}"),
    ]


async def _read(address: str, way: str, files: TlsFiles, chunks: list[Chunk]) -> float:
    with Peers(client_contexts(files) if way == "tls" else Plain) as peers:
        peer = peers.peer(address, NAMESPACE, DIGEST)
        begin = time.monotonic()
        await Fetch(lambda chunk: [peer], streams=STREAMS).bring_all(chunks, lambda chunk, data: None)
        return time.monotonic() - begin


def spread(rates: list[float]) -> str:
    return f"median of {len(rates)}, {min(rates):.2f} to {max(rates):.2f}, {STREAMS} streams, two processes"


def _processor(pid: int) -> float:
    """Seconds that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Plain(ssl.SSLContext):
    """Stands where a context of TLS does, and encrypts nothing: what TLS costs is measured beside it."""

    def __new__(cls) -> Plain:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def wrap_socket(self, sock: socket.socket, *_: Any, **__: Any) -> Any:
        timeout = sock.gettimeout()
        plain = PlainSocket(fileno=sock.detach())
        plain.settimeout(timeout)
        return plain


class PlainSocket(socket.socket):
    """With what is asked of one that encrypts."""

    def do_handshake(self) -> None:
        pass

    def getpeercert(self) -> dict[str, object]:
        return {"subject": ((("commonName", AGENT),),)}


def serve(way: str, tls: str, folder: str) -> None:
    context = server_context(TlsFiles.in_folder(Path(tls))) if way == "tls" else Plain()
    chunks = [Chunk(*each) for each in json.loads((Path(folder) / "chunks.json").read_text())]
    offered = Offered(NAMESPACE, DIGEST, MANIFEST, SIGNATURE, chunks)
    for chunk in chunks:
        offered.arrived(chunk, ChunkStore(Path(folder) / "store").path(chunk.hash))
    with PeerServer.listening("127.0.0.1:0", context, Offers({DIGEST: offered}.get), Egress(FAST, 64)) as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    serve(*sys.argv[1:])
