"""The echo engine in a process of its own, which can be killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from scaler.gateway.dispatcher import Backend, Endpoint


@dataclass
class Process:
    """An engine in a process of its own."""

    process: asyncio.subprocess.Process
    port: int

    def replica(self, name: str, netns: str = "") -> Backend:
        return Backend(name, "m", Endpoint("127.0.0.1", self.port, netns))

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def process(*arguments: str, inside: tuple[str, ...] = ()) -> AsyncIterator[Process]:
    """Starts the test engine; `held`: its pieces wait for POST /release. inside: a command that runs it, as in a namespace."""
    command = [*inside, sys.executable, "-m", "tests.worlds.echo_engine", *arguments]
    started = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdout is not None
    try:
        async with asyncio.timeout(30):
            yield Process(started, int(await started.stdout.readline()))
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
