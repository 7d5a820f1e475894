"""Keys that need work, each in one pair of hands at a time.

A key that is added again while it waits counts once; one that is added while it is worked on comes again after that, so no change is
missed and none is handled twice at once. Work that fails comes again after 0.2 s, 0.4 s, … up to five minutes for that key alone; work
may also ask to come again after a time. The same rules as client-go's queue, without its bucket for all keys together: the number of
workers bounds what hits the API server.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from zerowake_shared.backoff import Backoff

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.2, 300.0


class WorkQueue(Generic[K]):
    """`add` keys from anywhere in the loop; `run` works on them until cancelled."""

    def __init__(self) -> None:
        self._ready: deque[K] = deque()
        self._waiting: set[K] = set()  # in `_ready`
        self._working: set[K] = set()
        self._again: set[K] = set()  # added while worked on
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failing: dict[K, Backoff] = {}
        self._free = asyncio.Semaphore(0)

    def add(self, key: K) -> None:
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.append(key)
            self._free.release()

    def add_after(self, key: K, seconds: float) -> None:
        """Adds the key after a time, unless it is added sooner."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self.add, key)

    async def run(self, work: Callable[[K], Awaitable[float | None]], workers: int = 4) -> None:
        """Calls `work(key)` for each key. It returns after how many seconds the key comes again; None: not by itself."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(workers):
                    group.create_task(self._work(work), name=f"worker {number}")
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    async def _work(self, work: Callable[[K], Awaitable[float | None]]) -> None:
        while True:
            await self._free.acquire()
            key = self._ready.popleft()
            self._waiting.discard(key)
            self._working.add(key)
            try:
                seconds = await work(key)
                self._failing.pop(key, None)
            except Exception as error:
                backoff = self._failing.setdefault(key, Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS))
                seconds = backoff.next()
                log.warning("work on %s failed, again in %.1f s: %s", key, seconds, error, exc_info=backoff.failures > 3)
            finally:
                self._working.discard(key)
                again = key in self._again
                self._again.discard(key)
            if again:
                self.add(key)
            elif seconds is not None:
                self.add_after(key, seconds)
