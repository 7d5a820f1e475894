"""gpumem's server as its tests run it, and weights to fill it with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from blake3 import blake3
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client.control import Control
from gpumem.server.regions import identify
from gpumem.wire.blocking_connection import BlockingConnection
from gpumem.wire.errors import PeerGone
from tests.worlds.waiting import PATIENCE, blocking_until

MIB = 1 << 20
until = partial(blocking_until, not_yet=(PeerGone,))  # a server that is just being started or killed may refuse to say
GPUMEM = Path(sys.executable).with_name("gpumem")


@dataclass
class Weights:
    """A file of weights, and the layout that a region of them has."""

    path: Path
    data: bytes = field(repr=False)
    layout: bytes = field(repr=False)
    id: bytes
    chunks: int
    offset: int

    @property
    def sources(self) -> list[tuple[Path, int, int, int]]:
        return [(self.path, self.offset, 0, self.chunks)]

    def ref(self, device: str = "host") -> pb.RegionRef:
        return pb.RegionRef(device=device, id=self.id)


def make_weights(path: Path, size: int, chunk: int = 4 * MIB, offset: int = 137) -> Weights:
    """Random ones, which begin at an odd place in their file."""
    data = os.urandom(size)
    path.write_bytes(b"h" * offset + data)
    layout = pb.Layout(size=size)
    for at in range(0, size, chunk):
        part = data[at : at + chunk]
        layout.chunks.add(hash=blake3(part).digest(), size=len(part))
    serialized = layout.SerializeToString(deterministic=True)
    return Weights(path, data, serialized, identify(serialized), len(layout.chunks), offset)


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    socket: Path
    log: Path = field(default_factory=Path)

    def status(self) -> pb.Status:
        connection = BlockingConnection(self.socket, "test")
        try:
            return connection.ask(pb.Request(status=pb.GetStatus()))[0].status
        finally:
            connection.close()

    @property
    def host(self) -> pb.DeviceStatus:
        return self.status().devices[0]

    def filler(self) -> int:
        """Its pid, when there is one: 0 is a group of processes, to `kill`."""
        until(lambda: bool(self.host.filler_pid))
        return self.host.filler_pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def served(folder: Path, reserve: int, arena: int = 0, open_files: int = 0, floor: int = 0, behind: Sequence[str] = ()) -> Iterator[Served]:
    """A server of the host's memory, from when it answers and has a filler. `behind`: a command that becomes the one that follows it."""
    folder.mkdir(parents=True, exist_ok=True)
    socket = folder / "gpumem.sock"
    log = folder / "log"

    # Set by a shell: in a fork of this process, gRPC's threads of other tests would have a word before the program begins.
    limit = ("sh", "-c", f'ulimit -n {open_files} && exec "$@"', "sh") if open_files else ()
    with log.open("ab") as out:
        command = [
            *behind,
            *limit,
            str(GPUMEM),
            "serve",
            f"--socket={socket}",
            f"--reserve={reserve}",
            f"--arena={arena}",
            f"--floor={floor}",
        ]
        process = subprocess.Popen([*command, "--device=host"], stderr=out)
    found = Served(process, socket, log=log)
    try:
        until(lambda: socket.exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        found.filler()
        yield found
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            found.kill()
            raise
        text = log.read_text()
        assert status in (0, -signal.SIGKILL), text
        assert "Traceback" not in text, text


@contextlib.asynccontextmanager
async def stopped_fill(server: Served, control: Control, weights: Weights) -> AsyncIterator[asyncio.Task[pb.Filled]]:
    """A fill whose filler stands still until the block ends, so that it is certainly under way."""
    filler = server.filler()
    os.kill(filler, signal.SIGSTOP)
    try:
        filling = asyncio.create_task(control.fill(weights.layout, weights.sources, "host"))
        while not (await control.status()).fills:
            await asyncio.sleep(0.001)  # it tells nobody that it has begun
        yield filling
    finally:
        os.kill(filler, signal.SIGCONT)
