"""Images on their way from this node's disk into its memory, and there.

Staging verifies: skeleton first, so that a restore that does not wait for the rest can let CRIU begin, then every chunk on its way into
the arena. What stands in memory is trusted from then on. The skeleton lies in a tmpfs of this process's own mount namespace: it goes with
the agent, whatever ends it.

How much there may be, and what goes for another one, memory_budget.py says; which is read first, staging_order.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from restore_agent.drivers.headroom import Headroom
from restore_agent.errors import FAILURES, reason_of
from restore_agent.pages.fill import Arena
from restore_agent.sequences.memory_budget import GaveWay, MemoryBudget, all_of_it
from restore_agent.sequences.observer import Observer
from restore_agent.sequences.parked_budget import Share
from restore_agent.sequences.staged import Staged
from restore_agent.sequences.staging_order import StagingOrder
from restore_agent.snapshots.catalog import Corrupt, Snapshot
from restore_agent.snapshots.compatibility import Incompatible, check_fits
from restore_agent.snapshots.manifest import GpuRecord, Manifest, WeightsRegion, is_second_best
from restore_agent.snapshots.store import Store
from restore_agent.transfer.bandwidth import Bandwidth
from restore_agent.transfer.progress import Progress
from zerowake_shared.background import ended, to_its_end, told
from zerowake_shared.discard import discard

_LOG = logging.getLogger("zerowake.agent")


class Staging:
    """The snapshots that stand in this node's memory, or are on their way there."""

    def __init__(
        self,
        store: Store,
        memory: Path,
        criu_version: str,
        gpus: GpuRecord | None,
        headroom: Headroom,
        changed: Callable[[Snapshot], None],
        share: Share = all_of_it,
        needed: Callable[[str], bool] = lambda digest: False,
        observer: Observer | None = None,
    ) -> None:
        """`memory`: a tmpfs. `changed` hears of every snapshot whose rung or usability changed. `share`: of the node's memory, that images
        may take; and whether the image of a digest is `needed` by something else on the node. `observer`: is told of each that has come
        and of each that did not."""
        self._store = store
        self._memory = memory
        self._criu_version = criu_version
        self._gpus = gpus
        self._headroom = headroom
        self._changed = changed
        self._observer = observer
        self._staged: dict[str, Staged] = {}
        self._number = itertools.count()  # of each image that was wanted: no two share a folder
        self._seconds: dict[str, float] = {}  # digest → seconds that it was read for last
        self._order = StagingOrder()
        self._uses = store.uses
        self.budget = MemoryBudget(share, self._seconds_of, store.uses.of, needed, store.pins.in_memory)
        self._tasks: set[asyncio.Task[None]] = set()
        self._beside: set[asyncio.Task[None]] = set()  # what is done on the disk, and nobody waits for
        self.hashes = store.hashes
        self.disk_to_memory = Bandwidth()
        self.unusable: dict[str, str] = {}  # digest → why it cannot be restored here
        self.damaged: dict[str, str] = {}  # digest → what is wrong with it on the disk, by whoever has read it last

    def check_fits(self, manifest: Manifest) -> None:
        """Reads files: call it in a thread. Raises Incompatible: its snapshot cannot be restored on this node, wherever its bytes stand."""
        check_fits(manifest.fits, self._criu_version, self._gpus, in_pod=manifest.is_of_container, hashes=self.hashes)

    def in_memory(self, digest: str) -> bool:
        return (staged := self._staged.get(digest)) is not None and staged.ready.is_set()

    def found(self, digest: str) -> str:
        """On which rung the next request for it finds it, memory or disk. What was brought up for that request alone stood on the disk."""
        staged = self._staged.get(digest)
        return "memory" if staged and staged.ready.is_set() and not staged.for_request else "disk"

    def standing(self) -> list[Snapshot]:
        """Those whose images stand in memory, what is used most first."""
        there = [staged.snapshot for staged in self._staged.values() if staged.ready.is_set()]
        return sorted(there, key=lambda each: -self._uses.of(each.digest))

    def on_their_way(self) -> Iterator[tuple[Snapshot, Progress]]:
        """Images that come into memory now, or are about to."""
        for staged in self._staged.values():
            if staged.is_coming:
                done = staged.size - staged.bytes_to_come
                yield staged.snapshot, Progress(done, done, staged.size)

    @property
    def held_bytes(self) -> int:
        """What all images take of the node's memory, with those that are on their way."""
        return self.budget.taken_bytes

    def chunk(self, digest: str, chunk_hash: str) -> memoryview | None:
        """A chunk of a snapshot that stands in memory. From any thread; it stays as long as somebody has it."""
        staged = self._staged.get(digest)
        if staged is None or not staged.arena.done() or staged.arena.exception():
            return None
        staged.given = time.monotonic()
        return staged.arena.result().chunk(chunk_hash)

    @contextlib.contextmanager
    def hold(self, snapshot: Snapshot, *, urgent: bool = False) -> Iterator[Staged]:
        """Begins to stage the snapshot, unless it stands in memory already, and keeps it there until the block ends. `urgent`: a request
        waits for it, so that it overtakes all others, and takes the place of any that nobody uses.

        Raises, from the futures within: Corrupt, Incompatible, NoMemory, GaveWay, OSError.
        """
        staged = self._staged.get(snapshot.digest)
        if staged is None:
            if self._uses.wanted(snapshot.digest):
                self._do_beside(functools.partial(self._uses.keep, snapshot.digest), "note of a use")
            staged = self._staged[snapshot.digest] = Staged(snapshot, self._memory / f"{snapshot.digest}.{next(self._number)}")
            staged.task = asyncio.create_task(self._stage(staged), name=f"staging of {snapshot}")
            told(staged.task, _LOG)
            self._tasks.add(staged.task)
            staged.task.add_done_callback(functools.partial(self._ended, staged))
        if urgent:
            self._order.hurry(staged.turn)
            staged.for_request |= not staged.ready.is_set()
        staged.users += 1
        try:
            with self._on_disk(snapshot):
                yield staged
        finally:
            staged.users -= 1
            self._free(staged)

    def used(self, snapshot: Snapshot) -> None:
        """A replica was made of it, from whichever rung. Returns at once."""
        if staged := self._staged.get(snapshot.digest):
            staged.for_request = False
        self._uses.used(snapshot.digest)
        self._do_beside(functools.partial(self._uses.keep, snapshot.digest), "note of a use")

    @contextlib.contextmanager
    def _on_disk(self, snapshot: Snapshot) -> Iterator[None]:
        """What it is read from stays, also where it is removed or replaced meanwhile."""
        try:
            with self._store.hold(snapshot):
                yield
        finally:
            if self._store.postponed:
                self._do_beside(self._store.sweep, "sweep of what nobody reads any more")

    def _do_beside(self, work: Callable[[], None], name: str) -> None:
        task = asyncio.create_task(asyncio.to_thread(work), name=name)
        told(task, _LOG)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def stage(self, snapshot: Snapshot, *, urgent: bool = False) -> float:
        """disk → memory; returns the seconds that this call waited. `urgent`: as `hold` has it."""
        begin = time.monotonic()
        with self.hold(snapshot, urgent=urgent) as staged:
            await asyncio.shield(staged.skeleton)
            await asyncio.shield(staged.arena)
            await staged.ready.wait()
        return time.monotonic() - begin

    async def regions(self, snapshot: Snapshot) -> Sequence[WeightsRegion]:
        """What a snapshot keeps of its weights. Raises Corrupt."""
        return await asyncio.to_thread(self._store.regions, snapshot)

    def unstage(self, digest: str) -> None:
        """memory → disk, once the restores that use it have ended. What is on its way and nobody waits for is given up."""
        if staged := self._staged.pop(digest, None):
            staged.dropped = True
            staged.ready.clear()
            self._hold_headroom()
            self._changed(staged.snapshot)
            if not staged.users and staged.task:
                staged.task.cancel()
            self._free(staged)

    def give_up(self, digest: str) -> None:
        """Whoever wanted it has gone: if it is on its way, and nobody else waits, it goes no further."""
        staged = self._staged.get(digest)
        if staged and staged.is_coming and not staged.users:
            self.unstage(digest)

    async def close(self) -> None:
        await ended(self._tasks)
        for digest, staged in list(self._staged.items()):
            staged.fail(RuntimeError("staging was cancelled"))  # of one whose task had not begun
            self.unstage(digest)
        if self._beside:
            await asyncio.wait(self._beside)

    async def _stage(self, staged: Staged) -> None:
        with self._on_disk(staged.snapshot):
            await self._read_in(staged)

    async def _read_in(self, staged: Staged) -> None:
        snapshot = staged.snapshot
        try:
            async with self._order.turn(staged.turn):
                await to_its_end(asyncio.to_thread(self.check_fits, snapshot.manifest))
                self._make_room(staged)
                begin = time.monotonic()
                index = await to_its_end(asyncio.to_thread(self._stage_skeleton, staged))
                staged.skeleton.set_result(staged.directory / "images")
                arena = await to_its_end(asyncio.to_thread(Arena, snapshot.chunks, index))
                staged.turn.reads_into(arena)
                staged.arriving.set_result(arena)
                await arena.read(functools.partial(self._store.read_chunk, snapshot))
                if self._observer:
                    self._observer.staged("memory", arena.size, time.monotonic() - begin)
                if not staged.turn.has_paused:
                    staged.seconds = self._seconds[snapshot.digest] = time.monotonic() - begin
                    self.disk_to_memory.measured(arena.size, staged.seconds)
            staged.arena.set_result(arena)
            self.unusable.pop(snapshot.digest, None)
            self.damaged.pop(snapshot.digest, None)
            self._hold_headroom()
            await self._headroom.taken()
            staged.ready.set()
            if not self._store.stands(snapshot) and self._staged.get(snapshot.digest) is staged:
                self.unstage(snapshot.digest)  # it was removed or replaced as it came: who uses it does so to the end, and nobody else
        except BaseException as error:
            if isinstance(error, Corrupt):
                self.damaged[snapshot.digest] = str(error)
            elif isinstance(error, Incompatible):
                self.unusable[snapshot.digest] = str(error)
            if self._observer and isinstance(error, FAILURES) and not isinstance(error, GaveWay):
                self._observer.staging_failed("memory", reason_of(error))
            staged.fail(error if isinstance(error, Exception) else RuntimeError("staging was cancelled"))
            if self._staged.get(snapshot.digest) is staged:
                self.unstage(snapshot.digest)
            if not isinstance(error, Exception):
                raise
        self._changed(snapshot)

    def _ended(self, staged: Staged, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._free(staged)

    def _make_room(self, wanted: Staged) -> None:
        """Raises NoMemory."""
        for other in self.budget.let_in(wanted):
            _LOG.info("snapshot %s leaves the memory, of which %s needs %d MiB", other.snapshot, wanted.snapshot, wanted.size >> 20)
            if other.is_coming:
                other.fail(GaveWay(f"snapshot {other.snapshot} was on its way into memory, and a request needs the room for another one"))
                if other.task:
                    other.task.cancel()
            self.unstage(other.snapshot.digest)

    def _seconds_of(self, staged: Staged) -> float:
        """That it takes to come back."""
        measured = staged.seconds or self._seconds.get(staged.snapshot.digest, 0.0)
        return measured or (staged.size / self.disk_to_memory.rate if self.disk_to_memory.rate else 0.0)

    def _hold_headroom(self) -> None:
        """As much as the largest image in memory."""
        sizes = [staged.snapshot.manifest.page_bytes for staged in self._staged.values() if staged.arena.done()]
        self._headroom.want(max(sizes, default=0))

    def _stage_skeleton(self, staged: Staged) -> bytes:
        """Verifies and copies the small files; returns the index of pages."""
        snapshot = staged.snapshot
        index = b""
        for name, record in snapshot.manifest.files.items():
            if is_second_best(name):
                continue
            data = self._store.read_file(snapshot, name, record)
            if name == "pages.index":
                index = data
                continue
            target = staged.directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return index

    def _free(self, staged: Staged) -> None:
        """Unless somebody uses it, or a thread still writes into its folder."""
        if staged.dropped and not staged.users and (staged.task is None or staged.task.done()):
            discard(staged.directory)
            staged.task = None  # which a task that was cancelled would keep, and with it the memory
            self.budget.freed(staged)
