"""gpumem as a program: opens the devices and the arena, and serves them. The server makes the rest (its fillers, its connections)."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from gpumem.filler.arena import Arena
from gpumem.hardware.devices import open_memory
from gpumem.server.server import Server
from zerowake_shared.huge_pages import HugePages

logger = logging.getLogger(__name__)


async def run(path: Path, identities: Sequence[str], reserve: Callable[[int], int], floor: int, arena: int) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        path: the operator's socket.
        reserve: bytes to hold of a device, from the bytes that it has.
        floor: bytes of each device to leave free.
        arena: bytes of host memory to stage in.

    Raises:
        ServerBusy, MemoryFailed, OSError.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # A slab is an open file here, and so is every client.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    huge_pages = HugePages.of_memfds(path.parent).on
    memories = {identity: open_memory(identity, huge_pages) for identity in identities}
    wanted = {identity: reserve(memory.free()[1]) for identity, memory in memories.items()}
    server = Server(path, memories, Arena(arena, huge_pages), floor)
    async with server.serving(wanted):
        for device in server.devices.values():
            logger.info("%s: %d bytes held of %d wanted", device.identity, device.pool.free, wanted[device.identity])
        logger.info("serving on %s", path)
        await stop.wait()
