"""Standbys: replicas that only have to be woken. Their memory is there, their tasks stand still, their GPU state is suspended into it: they
cost host memory and nothing else. A node has at most one of each snapshot.

    restored ahead   CRIU made the processes, their pages are there, and CRIU holds them; its last step wakes them
    demoted          a replica that ran, let go of what is lent to it, was suspended and then stopped; a signal wakes it

What follows is the same for both: CUDA's resume beside the weights, then restore-complete. Rejected: letting CRIU finish and stopping the
tasks afterwards, since an engine without GPU state would have begun to run.

Who sleeps sees no time pass and then all of it at once: watchdogs, leases and idle timers that go by the monotonic clock go off at the
wake. A restore has no such jump, since CRIU makes a time namespace in which the clock goes on where it stood. A standby cannot get one: the
kernel fixes a time namespace's offsets when the first process is in it, and lets no process with threads change to another. So an engine
that is told of its wake (the control directory) is woken however long it slept. Any other is restored anew instead when it has slept for
longer than a busy machine may stall it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from restore_agent.engine.engine import Engine
from restore_agent.snapshots.store import Snapshot
from zerowake_shared.background import told

_LOG = logging.getLogger("zerowake.agent")

_STALL_SECONDS = 2.0  # by so much may the clock of an engine jump that is told nothing


@dataclass(eq=False)
class Standby:
    """A replica that stands still. `close` ends it; whoever calls `wake` instead takes `undo`, which ends the replica, over."""

    snapshot: Snapshot
    engine: Engine
    wake: Callable[[], Awaitable[object]]
    undo: contextlib.AsyncExitStack  # ends it
    gpu_pids: Sequence[int]  # on the host, of its processes with CUDA state
    gpus: Mapping[str, int]  # UUID → bytes that the suspend set free
    before: tuple[str, ...]  # UUIDs of all GPUs that the driver had at the suspend
    since: float = field(default_factory=time.monotonic)  # asleep since then

    @property
    def has_overslept(self) -> bool:
        """Whether its engine would take the time that it slept for time in which it hung."""
        return not self.snapshot.manifest.quiesces and time.monotonic() - self.since > _STALL_SECONDS

    async def close(self) -> None:
        await self.undo.aclose()


class Standbys:
    """The standbys of a node, by the digest of their snapshot."""

    def __init__(self, changed: Callable[[Snapshot], None]) -> None:
        """`changed` hears of each one that comes or goes."""
        self._changed = changed
        self._kept: dict[str, Standby] = {}  # the oldest first
        self._watchers: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def add(self, standby: Standby, keep_seconds: float) -> None:
        """`keep_seconds`: dropped after that; 0: kept. It is dropped, too, when its root process ends."""
        digest = standby.snapshot.digest
        if digest in self._kept:
            raise ValueError(f"snapshot {standby.snapshot} has a standby already")
        self._kept[digest] = standby
        self._watchers[digest] = asyncio.create_task(self._watch(standby, keep_seconds), name=f"standby of {standby.snapshot}")
        told(self._watchers[digest], _LOG)
        self._changed(standby.snapshot)

    def take(self, digest: str) -> Standby | None:
        """Out of the registry, to be woken or closed by the caller."""
        standby = self._kept.pop(digest, None)
        if standby is not None:
            self._watchers.pop(digest).cancel()
            self._changed(standby.snapshot)
        return standby

    async def drop(self, digest: str) -> None:
        """Ends it; without one, nothing."""
        if standby := self.take(digest):
            await standby.close()

    async def drop_oldest(self, but: str = "") -> bool:
        """Ends the one that was made first, but for that digest. False: there is none."""
        digest = next((each for each in self._kept if each != but), None)
        if digest is None:
            return False
        await self.drop(digest)
        return True

    async def drop_others(self, snapshot: Snapshot) -> None:
        """Those of older snapshots that had this one's name."""
        name = (snapshot.manifest.namespace, snapshot.manifest.name)
        for digest, kept in list(self._kept.items()):
            if (kept.snapshot.manifest.namespace, kept.snapshot.manifest.name) == name and digest != snapshot.digest:
                await self.drop(digest)

    async def close(self) -> None:
        while await self.drop_oldest():
            pass

    async def _watch(self, standby: Standby, keep_seconds: float) -> None:
        ended = standby.engine.place.exit_of(standby.engine.pid)
        await asyncio.wait([ended], timeout=keep_seconds or None)
        self._kept.pop(standby.snapshot.digest)
        self._watchers.pop(standby.snapshot.digest)
        self._changed(standby.snapshot)
        await standby.close()
