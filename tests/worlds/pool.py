"""gpumem's server on the host's memory, beside an agent."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from zerowake_proto import gpumem_pb2

from gpumem.client.control import Control
from gpumem.wire.errors import PeerGone


class Pool:
    """A gpumem server of its own."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    async def __aenter__(self) -> Pool:
        command = ["-c", "from gpumem.programs.commands import app; app()", "serve", "--reserve", "256M", "--device", "host", "--socket"]
        self.process = await asyncio.create_subprocess_exec(sys.executable, *command, str(self.socket))
        async with asyncio.timeout(20):
            while not await self._answers():
                await asyncio.sleep(0.02)  # until it listens
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()

    async def _answers(self) -> bool:
        try:
            async with Control.connected(self.socket):
                return True
        except PeerGone:
            return False

    async def status(self) -> gpumem_pb2.Status:
        async with Control.connected(self.socket) as control:
            return await control.status()
