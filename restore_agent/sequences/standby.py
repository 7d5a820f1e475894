"""Standbys: replicas that only have to be woken, on one of two rungs. A node has at most one of each snapshot.

    standby   their memory is there, their tasks stand still, their GPU state is suspended into it: they cost host memory and nothing else.
              Restored ahead: CRIU made the processes, their pages are there, and CRIU holds them; its last step lets them go.
              Demoted: a replica that ran, let go of what is lent to it, was suspended and then stopped; a signal lets it go.
    parked    their tasks run and wait for restore-complete, and their GPU state is on the GPU: they cost that memory, too, but of what was
              lent to them nothing, and no processor. A replica is parked as it lets go of what is lent; a standby, as CUDA resumes it.

The wake of a parked one brings the weights and says restore-complete; that of a standby begins with CUDA's resume, beside the weights.
Rejected: letting CRIU finish and stopping the tasks afterwards, since an engine without GPU state would have begun to run.

Who sleeps sees no time pass and then all of it at once: watchdogs, leases and idle timers that go by the monotonic clock go off at the
wake. A restore has no such jump, since CRIU makes a time namespace in which the clock goes on where it stood. A standby cannot get one: the
kernel fixes a time namespace's offsets when the first process is in it, and lets no process with threads change to another. So an engine
that is told of its wake (the control directory) is woken however long it slept. Any other is restored anew instead when it has slept for
longer than a busy machine may stall it.

From one rung to the other a standby goes under its lock, and whoever wants it meanwhile waits: it is soon where it can be woken from. Such
a move is not broken off when the one who wanted it leaves, since half of one is no rung at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from restore_agent.engine.engine import Engine, EngineError
from restore_agent.errors import FAILURES
from restore_agent.places.processes import has_ended
from restore_agent.snapshots.catalog import Snapshot
from zerowake_shared.background import told

_LOG = logging.getLogger("zerowake.agent")

_STALL_SECONDS = 2.0  # by so much may the clock of an engine jump that is told nothing


class Rung(enum.Enum):
    """How far a replica was brought ahead of need."""

    STANDBY = "standby"
    PARKED = "parked"


@dataclass(eq=False)
class Standby:
    """A replica that serves nobody. `close` ends it; whoever wakes it instead takes `undo`, which ends the replica, over."""

    snapshot: Snapshot
    engine: Engine
    let_go: Callable[[], Awaitable[object]]  # of its tasks, which stand still
    undo: contextlib.AsyncExitStack  # ends it
    gpu_pids: Sequence[int]  # on the host, of its processes with CUDA state
    gpus: Mapping[str, int]  # UUID → bytes that the suspend set free there; of a parked one: that it holds there
    before: tuple[str, ...]  # UUIDs of all GPUs that the driver had at the suspend
    rung: Rung = Rung.STANDBY
    standby_seconds: float = 0.0  # of a parked one: as a standby it is kept for so long more; 0: kept
    since: float = field(default_factory=time.monotonic)  # it serves nobody since then
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by whoever moves it or takes it
    processes: Collection[int] = ()  # on the host: all that it is of
    wake_bytes: Mapping[str, int] = field(default_factory=dict)  # UUID → bytes beside those of `gpus` that its engine takes as it wakes
    places: Mapping[str, str] = field(default_factory=dict)  # UUID of each GPU of the snapshot → of the one in its place, in `before`
    moved: Mapping[str, str] = field(init=False)  # UUID of each GPU as its engine knows it → of the one in its place
    is_closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.moved = {identity: identity for identity in self.before}
        self.places = self.places or self.moved

    @property
    def has_overslept(self) -> bool:
        """Whether its engine would take the time that it slept for time in which it hung."""
        return not self.snapshot.manifest.quiesces and time.monotonic() - self.since > _STALL_SECONDS

    def check_whole(self) -> None:
        """Where one of several ranks was killed meanwhile, the others would wait for it. Raises EngineError."""
        if ended := [pid for pid in self.processes if has_ended(pid)]:
            raise EngineError(f"of the {len(self.processes)} processes of an engine that waited, pid {ended[0]} has ended")

    def stands_on(self, pairs: Mapping[str, str]) -> None:
        """It is parked now. `pairs`: each GPU of the suspend → the one on which its state is."""
        self.gpus = {pairs.get(old, old): size for old, size in self.gpus.items()}
        self.wake_bytes = {pairs.get(old, old): size for old, size in self.wake_bytes.items()}
        self.moved = {known: pairs.get(now, now) for known, now in self.moved.items()}
        self.places = {captured: pairs.get(now, now) for captured, now in self.places.items()}
        self.rung = Rung.PARKED

    async def close(self) -> None:
        self.is_closed = True
        await self.undo.aclose()


Step = Callable[[Standby], Awaitable[None]]  # from one rung to the other; a standby that it has closed is of no more use


class Standbys:
    """The standbys of a node, by the digest of their snapshot."""

    def __init__(self, changed: Callable[[Snapshot], None], unpark: Step) -> None:
        """`changed` hears of each one that comes, moves or goes. `unpark`: what a parked one is moved by when its time is over."""
        self._changed = changed
        self._unpark = unpark
        self._kept: dict[str, Standby] = {}  # the oldest first
        self._watchers: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def __iter__(self) -> Iterator[Standby]:
        """Those that are there now, the oldest first."""
        return iter(list(self._kept.values()))

    def get(self, digest: str) -> Standby | None:
        """To be looked at, or moved."""
        return self._kept.get(digest)

    def add(self, standby: Standby, keep_seconds: float) -> None:
        """`keep_seconds`: dropped after that, or, parked, made a standby; 0: kept. It is dropped, too, when its root process ends."""
        digest = standby.snapshot.digest
        if digest in self._kept:
            raise ValueError(f"snapshot {standby.snapshot} has a standby already")
        self._kept[digest] = standby
        self._watch_over(standby, keep_seconds)
        self._changed(standby.snapshot)

    async def move(self, standby: Standby, to: Rung, step: Step, keep_seconds: float) -> bool:
        """Returns whether it stands on the rung, in whichever way it got there. False: another has taken or dropped it.

        Raises:
            What `step` raises. Where that has closed it, it is here no more.
        """
        moving = asyncio.create_task(self._move(standby, to, step, keep_seconds), name=f"{to.value} of {standby.snapshot}")
        try:
            return await asyncio.shield(moving)
        except asyncio.CancelledError:
            await asyncio.wait([moving])
            if not moving.cancelled() and (error := moving.exception()):
                _LOG.warning("%s failed, and nobody waited for it any more: %s", moving.get_name(), error)
            raise

    async def take(self, digest: str) -> Standby | None:
        """Out of the registry, to be woken or closed by the caller. Waits for a move to end."""
        while standby := self._kept.get(digest):
            async with standby.moving:
                if self._kept.get(digest) is standby:
                    self._forget(standby)
                    return standby
        return None

    async def drop(self, digest: str) -> None:
        """Ends it; without one, nothing."""
        if standby := await self.take(digest):
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

    async def _move(self, standby: Standby, to: Rung, step: Step, keep_seconds: float) -> bool:
        async with standby.moving:
            if self._kept.get(standby.snapshot.digest) is not standby:
                return False
            if standby.rung is to:
                return True
            try:
                await step(standby)
            except BaseException:
                if standby.is_closed:
                    self._forget(standby)
                raise
            self._watch_over(standby, keep_seconds)
            self._changed(standby.snapshot)
            return True

    def _forget(self, standby: Standby) -> None:
        """Only under its lock, so that its watcher is never cancelled in a move."""
        self._kept.pop(standby.snapshot.digest)
        watcher = self._watchers.pop(standby.snapshot.digest)
        if watcher is not asyncio.current_task():
            watcher.cancel()
        self._changed(standby.snapshot)

    def _watch_over(self, standby: Standby, keep_seconds: float) -> None:
        digest = standby.snapshot.digest
        if before := self._watchers.get(digest):
            before.cancel()
        self._watchers[digest] = asyncio.create_task(self._watch(standby, keep_seconds), name=f"standby of {standby.snapshot}")
        told(self._watchers[digest], _LOG)

    async def _watch(self, standby: Standby, keep_seconds: float) -> None:
        ended = standby.engine.place.exit_of(standby.engine.pid)
        while True:
            await asyncio.wait([ended], timeout=keep_seconds or None)
            async with standby.moving:
                if standby.rung is Rung.PARKED and not ended.done():
                    try:
                        await self._unpark(standby)
                    except FAILURES as error:
                        _LOG.warning("what was parked of %s is dropped: %s", standby.snapshot, error)
                    else:
                        keep_seconds = standby.standby_seconds
                        self._changed(standby.snapshot)
                        continue
                self._forget(standby)
            await standby.close()
            return
