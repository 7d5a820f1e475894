"""One agent of a fleet as a process of its own, as far as it fetches one snapshot's chunks and serves them: for tests and benchmarks.

    python -m tests.worlds.fleet_agent NAME FOLDER TLS RATE [--whole]

It says its port; gets, as lines of JSON, what to do; and answers each with one. It ends when its input does.
`--whole`: the chunks are in FOLDER already. RATE: bytes a second that it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from restore_agent.snapshots.chunks import CHUNK, Chunk, ChunkStore
from restore_agent.transfer.cascade import Cascade
from restore_agent.transfer.egress import Egress
from restore_agent.transfer.offers import Offered, Offers
from restore_agent.transfer.peer import Peer, Peers
from restore_agent.transfer.peer_server import PeerServer
from tests.worlds.peers import DIGEST, MANIFEST, NAMESPACE, SIGNATURE
from zerowake_shared.tls import TlsFiles, client_contexts, server_context

ROOT = Path(__file__).parents[2]


class FleetAgent:
    """The other end of such a process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, address: str) -> None:
        self.name = name
        self.process = process
        self.address = address

    async def fetch(self, members: Sequence[FleetAgent], origin: FleetAgent | None, holders: Sequence[FleetAgent] = ()) -> float:
        """Every chunk, verified and kept; returns the seconds. Raises RuntimeError: what it failed by."""
        answer = await self._ask(
            members={each.name: each.address for each in members if each is not self},
            holders={each.name: each.address for each in holders},
            origin=origin.address if origin else "",
        )
        if error := answer.get("error"):
            raise RuntimeError(error)
        return float(answer["seconds"])

    async def forget(self) -> None:
        """What it has fetched is removed."""
        await self._ask(forget=True)

    async def sent(self) -> int:
        """Bytes that it has served."""
        return int((await self._ask(sent=True))["sent"])

    async def _ask(self, **what: object) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return answer


@contextlib.asynccontextmanager
async def fleet_agent(name: str, folder: Path, tls: Path, chunks: Sequence[Chunk], rate: float, *options: str) -> AsyncIterator[FleetAgent]:
    """`tls`: the fleet's folder of certificates."""
    folder.mkdir(parents=True, exist_ok=True)
    named = folder / "chunks.json"
    named.write_text(json.dumps([[chunk.hash, chunk.size] for chunk in chunks]))
    command = (sys.executable, "-m", "tests.worlds.fleet_agent", name, str(folder), str(tls), str(rate), *options)
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT)
    try:
        assert process.stdout
        port = int(await process.stdout.readline())
        yield FleetAgent(name, process, f"127.0.0.1:{port}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


def random_chunks(folder: Path, size: int, chunk: int = CHUNK) -> list[Chunk]:
    """A store of random chunks, as `--whole` takes it."""
    store = ChunkStore(folder / "store")
    with store.lease() as lease:
        return [lease.put(os.urandom(min(chunk, size - at))) for at in range(0, size, chunk)]


async def _fetch(name: str, peers: Peers, asked: Mapping[str, Any], chunks: Sequence[Chunk], store: ChunkStore, offered: Offered) -> float:
    def peer(address: str) -> Callable[[float], Peer]:
        return lambda patience: peers.peer(address, NAMESPACE, DIGEST, patience)

    members = {member: peer(address) for member, address in asked["members"].items()}
    holders = {holder: peer(address)(0.0) for holder, address in asked["holders"].items()}
    cascade = Cascade(name, members, holders, [peer(asked["origin"])(0.0)] if asked["origin"] else [])
    begin = time.monotonic()
    await cascade.bring_all(chunks, store.write, lambda chunk: offered.arrived(chunk, store.path(chunk.hash)))
    return time.monotonic() - begin


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line


def main() -> None:
    name, folder, tls, rate, *options = sys.argv[1:]
    chunks = [Chunk(*each) for each in json.loads((Path(folder) / "chunks.json").read_text())]
    store = ChunkStore(Path(folder) / "store")
    files = TlsFiles.in_folder(Path(tls))

    def fresh() -> Offered:
        return Offered(NAMESPACE, DIGEST, MANIFEST, SIGNATURE, chunks)

    current = [fresh()]
    if "--whole" in options:
        for chunk in chunks:
            current[0].arrived(chunk, store.path(chunk.hash))
    offers, egress = Offers(lambda digest: current[0] if digest == DIGEST else None), Egress(float(rate), 256)
    with PeerServer.listening("127.0.0.1:0", server_context(files), offers, egress) as server, Peers(client_contexts(files)) as peers:
        print(server.port, flush=True)
        for line in _lines():
            asked = json.loads(line)
            answer: dict[str, Any] = {}
            if "sent" in asked:
                answer["sent"] = egress.sent
            elif "forget" in asked:
                current[0] = fresh()
                store.collect(set())
            else:
                try:
                    answer["seconds"] = asyncio.run(_fetch(name, peers, asked, chunks, store, current[0]))
                except Exception as error:
                    answer["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
