"""A connection between programs that can be cut, slow, silent or refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path


class Proxy:
    """In front of a port of this machine, or of a socket. rate: bytes a second of answers; silent: what is made or sent goes nowhere until
    it ends. All that is done to it says whether anybody may have felt it.
    """

    def __init__(self, target: int | Path) -> None:
        self.target = target
        self.port = 0
        self.rate = float("inf")
        self.refuses = False
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def laid(self, at: Path | None = None) -> AsyncIterator[Proxy]:
        """Listens at that path, or at a port."""
        if at:
            server = await asyncio.start_unix_server(self._connect, at)
        else:
            server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def cut(self) -> bool:
        for writer in self._writers:
            writer.transport.abort()
        return bool(self._writers)

    def slow(self) -> bool:
        self.rate = 20_000.0
        return True

    def silence(self) -> bool:
        self._speaks.clear()
        return True

    def refuse(self) -> bool:
        """And none that is there goes on."""
        self.refuses = True
        self.cut()
        return True

    def heal(self) -> None:
        """What was lost on the way stays lost: connections that were silent end."""
        if not self._speaks.is_set():
            self.cut()
        self.rate, self.refuses = float("inf"), False
        self._speaks.set()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        ends = {writer}
        self._writers |= ends
        try:
            await self._speaks.wait()
            if isinstance(self.target, Path):
                there, back = await asyncio.open_unix_connection(self.target)
            else:
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
            ends.add(back)
            self._writers.add(back)
            ways = [asyncio.create_task(self._pump(*way)) for way in ((reader, back, float("inf")), (there, writer, None))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)  # who has gone is told to the other
            finally:
                for way in ways:
                    way.cancel()
        except OSError:
            pass
        finally:
            for each in ends:
                each.transport.abort()
            self._writers -= ends

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: float | None) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(16 << 10):
                await self._speaks.wait()
                speed = self.rate if rate is None else rate
                await asyncio.sleep(len(data) / speed)
                writer.write(data)
                await writer.drain()
