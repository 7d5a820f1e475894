"""Images on their way from this node's disk into its memory, and there.

Staging verifies: skeleton first, so that a restore that does not wait for the rest can let CRIU begin, then every chunk on its way into
the arena. What stands in memory is trusted from then on. The skeleton lies in a tmpfs of this process's own mount namespace: it goes with
the agent, whatever ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from restore_agent.drivers.headroom import Headroom
from restore_agent.drivers.meminfo import available_memory
from restore_agent.errors import AgentError, ErrorKind
from restore_agent.pages.fill import Arena
from restore_agent.snapshots.catalog import Corrupt, Snapshot
from restore_agent.snapshots.compatibility import Incompatible, check_fits
from restore_agent.snapshots.manifest import GpuRecord, Manifest, WeightsRegion, is_second_best
from restore_agent.snapshots.store import Store
from restore_agent.transfer.bandwidth import Bandwidth
from restore_agent.transfer.progress import Progress
from zerowake_shared.background import ended, told

SPARE_BYTES = 256 << 20  # of the node's memory that staging never takes
_LOG = logging.getLogger("zerowake.agent")


class NoMemory(AgentError):
    """The node has not enough free memory to stage or restore."""

    kind = ErrorKind.EXHAUSTED
    reason = "no-memory"


class Staged:
    """One snapshot in memory, or on its way there: await `skeleton`, then `arriving` to fill from it meanwhile, or `arena`."""

    def __init__(self, snapshot: Snapshot, directory: Path) -> None:
        self.snapshot = snapshot
        self.directory = directory
        loop = asyncio.get_running_loop()
        self.skeleton: asyncio.Future[Path] = loop.create_future()  # CRIU's images directory
        self.arriving: asyncio.Future[Arena] = loop.create_future()  # while chunks still come: a fill takes each, and fails as they do
        self.arena: asyncio.Future[Arena] = loop.create_future()  # with every page
        self.ready = asyncio.Event()  # set once arena and headroom are complete
        self.users = 0
        self.dropped = False

    def fail(self, error: Exception) -> None:
        """Whoever waits for what has not come gets this error."""
        for future in (self.skeleton, self.arriving, self.arena):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting


class Staging:
    """The snapshots that stand in this node's memory, or are on their way there."""

    def __init__(
        self, store: Store, memory: Path, criu_version: str, gpus: GpuRecord | None, headroom: Headroom, changed: Callable[[Snapshot], None]
    ) -> None:
        """`memory`: a tmpfs. `changed` hears of every snapshot whose rung or usability changed."""
        self._store = store
        self._memory = memory
        self._criu_version = criu_version
        self._gpus = gpus
        self._headroom = headroom
        self._changed = changed
        self._staged: dict[str, Staged] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeps: set[asyncio.Task[None]] = set()
        self.hashes = store.hashes
        self.disk_to_memory = Bandwidth()
        self.unusable: dict[str, str] = {}  # digest → why it cannot be restored here
        self.damaged: dict[str, str] = {}  # digest → what is wrong with it on the disk

    def check_fits(self, manifest: Manifest) -> None:
        """Reads files: call it in a thread. Raises Incompatible: its snapshot cannot be restored on this node, wherever its bytes stand."""
        check_fits(manifest.fits, self._criu_version, self._gpus, in_pod=manifest.is_of_container, hashes=self.hashes)

    def in_memory(self, digest: str) -> bool:
        return (staged := self._staged.get(digest)) is not None and staged.ready.is_set()

    def on_their_way(self) -> Iterator[tuple[Snapshot, Progress]]:
        """Images that come into memory now, or are about to."""
        for staged in self._staged.values():
            if not staged.arena.done():
                total, begun = staged.snapshot.manifest.page_bytes, staged.arriving.done()
                done = staged.arriving.result().arrived_bytes if begun else 0
                yield staged.snapshot, Progress(done, done, total)

    @property
    def held_bytes(self) -> int:
        """What all images take of the node's memory, with those that are on their way."""
        return sum(staged.snapshot.manifest.page_bytes for staged in self._staged.values())

    def chunk(self, digest: str, chunk_hash: str) -> memoryview | None:
        """A chunk of a snapshot that stands in memory. From any thread; it stays as long as somebody has it."""
        staged = self._staged.get(digest)
        if staged is None or not staged.arena.done() or staged.arena.exception():
            return None
        return staged.arena.result().chunk(chunk_hash)

    @contextlib.contextmanager
    def hold(self, snapshot: Snapshot) -> Iterator[Staged]:
        """Begins to stage the snapshot, unless it stands in memory already, and keeps it there until the block ends.

        Raises, from the futures within: Corrupt, Incompatible, NoMemory, OSError.
        """
        staged = self._staged.get(snapshot.digest)
        if staged is None:
            staged = self._staged[snapshot.digest] = Staged(snapshot, self._memory / snapshot.digest)
            task = asyncio.create_task(self._stage(staged), name=f"staging of {snapshot}")
            told(task, _LOG)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        staged.users += 1
        try:
            with self._on_disk(snapshot):
                yield staged
        finally:
            staged.users -= 1
            if staged.dropped and not staged.users:
                self._free(staged)

    @contextlib.contextmanager
    def _on_disk(self, snapshot: Snapshot) -> Iterator[None]:
        """What it is read from stays, also where it is removed or replaced meanwhile."""
        try:
            with self._store.hold(snapshot):
                yield
        finally:
            if self._store.postponed:
                sweep = asyncio.create_task(asyncio.to_thread(self._store.sweep), name="sweep of what nobody reads any more")
                told(sweep, _LOG)
                self._sweeps.add(sweep)
                sweep.add_done_callback(self._sweeps.discard)

    async def stage(self, snapshot: Snapshot) -> float:
        """disk → memory; returns the seconds that this call waited."""
        begin = time.monotonic()
        with self.hold(snapshot) as staged:
            await asyncio.shield(staged.skeleton)
            await asyncio.shield(staged.arena)
            await staged.ready.wait()
        return time.monotonic() - begin

    async def regions(self, snapshot: Snapshot) -> Sequence[WeightsRegion]:
        """What a snapshot keeps of its weights. Raises Corrupt."""
        return await asyncio.to_thread(self._store.regions, snapshot)

    def unstage(self, digest: str) -> None:
        """memory → disk, once the restores that use it have ended."""
        if staged := self._staged.pop(digest, None):
            staged.dropped = True
            staged.ready.clear()
            self._hold_headroom()
            self._changed(staged.snapshot)
            if not staged.users:
                self._free(staged)

    async def close(self) -> None:
        await ended(self._tasks)
        for digest, staged in list(self._staged.items()):
            staged.fail(RuntimeError("staging was cancelled"))  # of one whose task had not begun
            self.unstage(digest)
        if self._sweeps:
            await asyncio.wait(self._sweeps)

    async def _stage(self, staged: Staged) -> None:
        with self._on_disk(staged.snapshot):
            await self._read_in(staged)

    async def _read_in(self, staged: Staged) -> None:
        snapshot = staged.snapshot
        try:
            begin = time.monotonic()
            index = await asyncio.to_thread(self._stage_skeleton, staged)
            staged.skeleton.set_result(staged.directory / "images")
            arena = await asyncio.to_thread(Arena, snapshot.chunks, index)
            staged.arriving.set_result(arena)
            await arena.read(functools.partial(self._store.read_chunk, snapshot))
            self.disk_to_memory.measured(arena.size, time.monotonic() - begin)
            staged.arena.set_result(arena)
            self.unusable.pop(snapshot.digest, None)
            self._hold_headroom()
            await self._headroom.taken()
            staged.ready.set()
        except BaseException as error:
            if isinstance(error, Corrupt | Incompatible):
                self.unusable[snapshot.digest] = str(error)
            staged.fail(error if isinstance(error, Exception) else RuntimeError("staging was cancelled"))
            if self._staged.get(snapshot.digest) is staged:
                self.unstage(snapshot.digest)
            if not isinstance(error, Exception):
                raise
        self._changed(snapshot)

    def _hold_headroom(self) -> None:
        """As much as the largest image in memory."""
        sizes = [staged.snapshot.manifest.page_bytes for staged in self._staged.values() if staged.arena.done()]
        self._headroom.want(max(sizes, default=0))

    def _stage_skeleton(self, staged: Staged) -> bytes:
        """Verifies and copies the small files; returns the index of pages."""
        snapshot = staged.snapshot
        self.check_fits(snapshot.manifest)
        free = available_memory()
        if free < snapshot.manifest.page_bytes + SPARE_BYTES:
            raise NoMemory(
                f"snapshot {snapshot} needs {snapshot.manifest.page_bytes >> 20} MiB to stand in memory; {free >> 20} MiB are free: "
                "unstage another, or end replicas"
            )
        shutil.rmtree(staged.directory, ignore_errors=True)
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
        shutil.rmtree(staged.directory, ignore_errors=True)
