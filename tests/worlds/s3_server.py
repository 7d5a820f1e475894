"""An S3 server as people run them: the Versity gateway over a folder, and a connection to it that a test can cut and slow down.

Buckets are folders of its root, and objects files in those: so a test damages an object as a disk would.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster.layout import CACHE
from tests.worlds.ports import free_port
from tests.worlds.waiting import blocking_until

KEY, SECRET = "zerowake-tests", "not-a-secret"
_PROGRAM = CACHE / "s3/versitygw"


@dataclass(frozen=True)
class S3Server:
    """One that runs. `root`: the folder that it serves."""

    root: Path
    port: int
    host: str = "127.0.0.1"

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def accesses(self) -> str:
        """What it was asked for so far, a line each, in the format of S3's own access logs."""
        return _access_log(self.root.parent).read_text()

    def make_bucket(self, name: str) -> str:
        (self.root / name).mkdir()
        return name

    def environment(self) -> Mapping[str, str]:
        """Of whoever is to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def add_user(self, name: str, secret: str) -> None:
        """One who has no right to anything that is there."""
        admin = [str(_PROGRAM), "admin", "--endpoint-url", self.endpoint, "--access", KEY, "--secret", SECRET, "--allow-insecure"]
        subprocess.run([*admin, "create-user", "--access", name, "--secret", secret, "--role", "user"], check=True, capture_output=True)


@contextlib.contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Serves `folder`/root at an address of this machine; everything that it writes besides is in `folder`, too."""
    assert _PROGRAM.exists(), f"{_PROGRAM} is missing: `make test` builds it, or tests/worlds/s3/build.sh"
    server = S3Server(folder / "root", free_port(), host)
    for each in (server.root, folder / "meta", folder / "users"):
        each.mkdir(exist_ok=True)
    command: list[str | Path] = [
        _PROGRAM,
        "--access",
        KEY,
        "--secret",
        SECRET,
        "--port",
        f"{host}:{server.port}",
        "--keep-alive",
        "--quiet",
        "--access-log",
        _access_log(folder),
    ]
    command += ["--iam-dir", folder / "users", "posix", "--sidecar", folder / "meta", server.root]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            blocking_until(lambda: _answers(host, server.port) or process.poll() is not None, "the S3 server answers")
            assert process.poll() is None, (folder / "log").read_text()
            yield server
        finally:
            process.kill()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes at `folder`. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


class Wire:
    """Between clients and a server. `cut_after`: bytes of answers, after which a connection ends; `rate`: of all answers, bytes/s."""

    def __init__(self, port: int) -> None:
        self._server = port
        self.port = 0
        self.cut_after: int | None = None
        self.rate = float("inf")
        self.passed = 0  # bytes of answers
        self.connections = 0
        self._free_at = 0.0
        self._ends: set[asyncio.StreamWriter] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def laid(self) -> AsyncIterator[Wire]:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._ends:
                writer.transport.abort()
            while self._ends:
                await asyncio.sleep(0)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ends = {writer}
        self._ends |= ends
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._server)
            ends.add(back)
            self._ends.add(back)
            asks = asyncio.create_task(_pass_on(reader, back))
            try:
                await self._answer(there, writer)
            finally:
                asks.cancel()
        for each in ends:
            each.transport.abort()
        self._ends -= ends

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = 0
        while data := await there.read(64 << 10):
            if self.cut_after is not None and sent + len(data) > self.cut_after:
                writer.write(data[: max(0, self.cut_after - sent)])
                await writer.drain()
                return
            now = asyncio.get_running_loop().time()
            self._free_at = max(now, self._free_at) + len(data) / self.rate
            await asyncio.sleep(self._free_at - now)
            writer.write(data)
            await writer.drain()
            sent += len(data)
            self.passed += len(data)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(64 << 10):
            writer.write(data)
            await writer.drain()


def _access_log(folder: Path) -> Path:
    return folder / "accesses"


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
