"""The engine's side of the snapshot control directory (NVIDIA Snapshot's workload protocol).

An engine that is told of a control directory (SNAPSHOT_CONTROL_DIR) is about to be dumped: once it serves and is warm it makes itself
small and quiet, writes `ready-for-snapshot`, and goes on serving. What is not the process's own (weights in gpumem) is put away first, and
brought back when the agent has answered; an engine that cannot work without it says so at its health path, from before it listens, so that
nobody asks it anything that it could only answer later. The agent answers with `snapshot-complete` in the process that was
dumped and with `restore-complete` in each one restored from the image. Files appear whole: a temporary name, then renamed.

Only the time between ready and that answer is polled, since an inotify descriptor would be one more thing in the image.
"""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

READY = "ready-for-snapshot"
ANSWERS = ("snapshot-complete", "restore-complete")
POLL_SECONDS = 0.005  # what an engine with weights in gpumem waits for before its first answer

M_ARENA_MAX = -8  # mallopt(3)
libc = ctypes.CDLL(None)


def keep_memory_together() -> None:
    """One malloc arena instead of one a thread. To be called before anything starts threads.

    The chat engine's image loses 260 of 870 mappings and 13 of 313 MB by it.
    """
    libc.mallopt(M_ARENA_MAX, 1)


def quiesce() -> None:
    """Gives back what the process does not use: what stays is in the image, and every restore copies it."""
    gc.collect()
    libc.malloc_trim(0)


class Snapshot:
    """This process's part in a snapshot, if anybody asked for one."""

    def __init__(self, asleep: Callable[[], AbstractAsyncContextManager[None]] | None = None) -> None:
        """`asleep`: within it, nothing of others is held."""
        named = os.environ.get("SNAPSHOT_CONTROL_DIR")
        self._directory = Path(named) if named else None
        self._asleep = asleep
        self._away = AsyncExitStack()

    async def begin(self) -> None:
        """To be called before anybody can reach the engine."""
        if self._directory and self._asleep:
            await self._away.enter_async_context(self._asleep())

    async def take(self) -> str | None:
        """Offers this process and waits for what came of it: one of ANSWERS, or None where nobody asked for a snapshot."""
        if not self._directory:
            return None
        quiesce()
        fresh = self._directory / f".{READY}"
        fresh.touch()
        fresh.rename(self._directory / READY)
        while True:
            for answer in ANSWERS:
                if (self._directory / answer).exists():
                    await self._away.aclose()
                    return answer
            await asyncio.sleep(POLL_SECONDS)
