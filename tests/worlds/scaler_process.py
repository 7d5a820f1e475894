"""An external scaler in a process of its own, with demand that a test makes: what can be killed, restarted and measured.

Run as `python -m tests.worlds.scaler_process ADDRESS MODELS [PEERS]`: it says the bound address, and the one where it answers its peers,
then obeys lines of standard input, `hold MODEL…`, `leave MODEL…` or `all` (hold every model), and answers each with the time.monotonic()
at which it began to. `watched` is answered when every model has had a stream. PEERS are the addresses of the others, with commas between
them. SIGTERM ends it as it ends `zerowake`: streams first, with OK.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvloop

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.trigger import Trigger
from scaler.fleet.addresses import looked_up
from scaler.fleet.peers import Peers
from scaler.keda.external_scaler import serve_external_scaler


def models(count: int) -> list[str]:
    return [f"model-{number}" for number in range(count)]


class ScalerProcess:
    """The other end: the running process."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, peer: str) -> None:
        self.process = process
        self.address = address
        self.peer = peer

    async def do(self, verb: str, names: Sequence[str] = (), within: float = 60.0) -> float:
        """Returns the time.monotonic() at which the process began to do it."""
        assert self.process.stdin
        self.process.stdin.write(" ".join([verb, *names]).encode() + b"\n")
        return float(await _line(self.process, within))

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


async def _line(process: asyncio.subprocess.Process, within: float = 60.0) -> str:
    assert process.stdout
    async with asyncio.timeout(within):
        line = await process.stdout.readline()
    assert line, f"the scaler's process ended with {await process.wait()}; its error is above"
    return line.decode().strip()


@asynccontextmanager
async def scaler_process(address: str, count: int, peers: Sequence[str] = ()) -> AsyncIterator[ScalerProcess]:
    """A scaler that knows `models(count)`; it is gone afterwards, whatever happened."""
    command = (sys.executable, "-m", "tests.worlds.scaler_process", address, str(count), ",".join(peers))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**20)
    try:
        yield ScalerProcess(process, await _line(process), await _line(process))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _serve(address: str, count: int, others: Sequence[str]) -> None:
    ledger = Ledger({name: ModelLimits() for name in models(count)})
    peers = Peers(ledger)
    unwatched = set(models(count))
    all_watched = asyncio.Event()

    def opened(trigger: Trigger) -> None:
        unwatched.discard(trigger.model)
        if not unwatched:
            all_watched.set()

    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=2**20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    obeying = asyncio.current_task()
    assert obeying
    loop.add_signal_handler(signal.SIGTERM, obeying.cancel)
    async with (
        peers.serve("127.0.0.1:0") as peer,
        looked_up(others) as addresses,
        peers.follow(addresses),
        serve_external_scaler(ledger, address=address, on_trigger=opened) as bound,
    ):
        print(bound, peer, sep="\n", flush=True)
        while line := await lines.readline():
            verb, *names = line.decode().split()
            if verb == "watched":
                await all_watched.wait()
            began = time.monotonic()
            for name in names or (models(count) if verb == "all" else ()):
                if verb == "leave":
                    ledger.leave(name, 0)
                else:
                    ledger.hold(name, 0)
            print(began, flush=True)


if __name__ == "__main__":
    try:
        uvloop.run(_serve(sys.argv[1], int(sys.argv[2]), [name for name in sys.argv[3].split(",") if name]))
    except asyncio.CancelledError:
        sys.exit(0)
