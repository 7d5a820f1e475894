"""From a snapshot to a serving replica, or to a standby, which only has to be woken.

    place    →  CRIU: skeleton  →  (it holds every task)  →  fill pages  ┃  CRIU lets go  →  CUDA  ┃  restore-complete
       staging into memory, where it does not stand there yet,           ┃                          ┃
       runs beside all of it                                          standby                    parked
                                                        weights into lent memory run beside what is left to do

What is here leads to a standby; transitions.py leads from there on. Whatever goes wrong names a reason (attempt.py), and the engine is
started cold where the caller gave its command. The first held request is a restored replica's proof, so nobody asks for its health here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path

from restore_agent.drivers.criu import Criu, CriuError, Worker
from restore_agent.drivers.cuda import Cuda
from restore_agent.drivers.headroom import Headroom
from restore_agent.drivers.meminfo import available_memory
from restore_agent.engine import renewal
from restore_agent.engine.control import Control
from restore_agent.engine.engine import Engine
from restore_agent.pages.addresses import readdressed
from restore_agent.places.place import Output, Place
from restore_agent.places.rootless import Rootless
from restore_agent.places.sandbox import Sandbox
from restore_agent.places.sandboxes import Sandboxes
from restore_agent.places.shared_folders import caches
from restore_agent.sequences.attempt import RestoreFailed, attempt
from restore_agent.sequences.gpu_choice import Suspended
from restore_agent.sequences.memory_budget import SPARE_BYTES, NoMemory
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.staged import Staged
from restore_agent.sequences.staging import Staging
from restore_agent.sequences.standby import Standby
from restore_agent.sequences.transitions import Transitions
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.compatibility import check_gpus
from restore_agent.snapshots.manifest import EngineRecord, Manifest
from restore_agent.transfer.bandwidth import Bandwidth
from zerowake_shared.background import ended, to_its_end
from zerowake_shared.discard import discard
from zerowake_shared.huge_pages import HugePages
from zerowake_shared.phases import Phase

_LET_GO_SECONDS = 10.0  # CRIU's last step takes milliseconds
_MOVING = (Phase.FETCH, Phase.IMAGE_FILL, Phase.STAGED_PAGES, Phase.WEIGHTS)  # which is counted by bytes
_DISK_RATE, _FILL_RATE = 1e9, 4e9  # bytes a second, of a small machine (as in scaler/plan/estimate.py), until something was measured
OpenPlace = Callable[[], Awaitable[Place]]  # makes, or opens, what a replica is restored into


class Restorer:
    """Makes replicas and standbys out of snapshots, and replicas out of commands, with what the node has for it."""

    def __init__(
        self,
        criu: Criu | None,
        why_no_criu: str,
        sandboxes: Sandboxes,
        staging: Staging,
        huge: HugePages,
        headroom: Headroom,
        cuda: Cuda | None,
        transitions: Transitions,
    ) -> None:
        """Without `criu`, every restore fails with `why_no_criu`."""
        self._criu = criu
        self._why_no_criu = why_no_criu
        self._sandboxes = sandboxes
        self._staging = staging
        self._huge = huge
        self._headroom = headroom
        self._cuda = cuda
        self._transitions = transitions
        self.memory_to_process = Bandwidth()
        self.overhead: dict[str, float] = {}  # digest → seconds of a restore beside its fill, smoothed

    async def restore(
        self, snapshot: Snapshot, phases: Phases, open_place: OpenPlace | None = None, given: Sequence[str] | None = None
    ) -> Engine:
        """`given`: the place's own GPUs (`Place.gpus`). Raises RestoreFailed; then nothing is left of it."""
        async with attempt(snapshot):
            criu = self._usable(snapshot)
            if given is not None and self._cuda:
                check_gpus(snapshot.manifest.fits.gpus, self._cuda.gpus(given))
            tree = _dumped(snapshot, given)
            with self._staging.hold(snapshot, urgent=True) as staged:
                async with (
                    self._transitions.gpus.chosen(tree) as pairs,
                    self._transitions.weights_on_their_way(snapshot, tree, pairs) as weights,
                ):
                    standby = await self._hold(criu, snapshot, staged, phases, open_place or self._sandbox(snapshot))
                    engine = await self._transitions.finish(standby, weights, pairs, phases)
        overhead = phases.total - sum(
            phases.seconds(moving) for moving in (Phase.FETCH, Phase.IMAGE_FILL, Phase.STAGED_PAGES, Phase.WEIGHTS)
        )
        before = self.overhead.get(snapshot.digest, overhead)
        self.overhead[snapshot.digest] = before + 0.3 * (overhead - before)
        if open_place is None:
            self.make_ready(snapshot)
        self._staging.used(snapshot)
        return engine

    def seconds_from_disk(self, manifest: Manifest) -> float:
        """Of a restore whose image is on the disk: what moving it takes, at the rates measured here or those of a small machine."""
        from_disk = manifest.image_bytes / (self._staging.disk_to_memory.rate or _DISK_RATE)
        return from_disk + manifest.page_bytes / (self.memory_to_process.rate or _FILL_RATE)

    def make_ready(self, snapshot: Snapshot) -> None:
        """For the next restore of it on this machine: a sandbox. Returns at once."""
        if self._criu and not snapshot.manifest.is_of_container:
            self._sandboxes.make_ready(snapshot.manifest.engine.shared)

    async def prepare(self, snapshot: Snapshot, open_place: OpenPlace | None = None) -> Standby:
        """Restores a replica as far as it costs no GPU memory. Raises RestoreFailed; then nothing is left of it."""
        async with attempt(snapshot):
            criu = self._usable(snapshot)
            if (free := available_memory()) < snapshot.manifest.page_bytes + SPARE_BYTES:
                needed = snapshot.manifest.page_bytes >> 20
                raise NoMemory(f"a standby needs {needed} MiB of memory and {free >> 20} MiB are free: drop another, or end replicas")
            with self._staging.hold(snapshot) as staged:
                return await self._hold(criu, snapshot, staged, Phases(), open_place or self._sandbox(snapshot))

    def _usable(self, snapshot: Snapshot) -> Criu:
        if os.geteuid() != 0:
            raise RestoreFailed("not-root", "restoring needs root; start the agent with sudo")
        if self._criu is None:
            raise RestoreFailed("no-criu", self._why_no_criu)
        if why := self._staging.damaged.get(snapshot.digest):
            raise RestoreFailed("corrupt", why)
        if why := self._staging.unusable.get(snapshot.digest):
            raise RestoreFailed("unusable", f"snapshot {snapshot} failed before on this node: {why}")
        return self._criu

    def _sandbox(self, snapshot: Snapshot) -> Callable[[], Awaitable[Sandbox]]:
        return functools.partial(self._sandboxes.create, snapshot.manifest.engine.shared)

    async def _hold(self, criu: Criu, snapshot: Snapshot, staged: Staged, phases: Phases, open_place: OpenPlace) -> Standby:
        """CRIU's part and the fill, up to the moment at which every page is there and every task waits.

        snapshot: as it was asked for: `staged` may know it by the folder that it was proved in, which is gone.
        """
        manifest = snapshot.manifest
        self._headroom.give()
        async with contextlib.AsyncExitStack() as undo:
            with phases.phase(Phase.IMAGE_SANDBOX):
                place = await open_place()
                undo.push_async_exit(place)
                output = place.output(manifest.model)
                undo.callback(output.close)
            with phases.phase(Phase.STAGED):
                images = await asyncio.shield(staged.skeleton)
            begin = time.monotonic()
            held, go = asyncio.Event(), asyncio.Event()

            async def filled() -> None:
                held.set()
                await go.wait()

            restored = self._restored(criu, staged, images, place, output, phases, filled)
            restoring = asyncio.create_task(restored, name=f"CRIU of {snapshot}")
            undo.push_async_callback(ended, [restoring])
            renews = await asyncio.to_thread(renewal.read, staged.directory)  # beside CRIU
            waiting = asyncio.create_task(held.wait())
            try:
                await asyncio.wait([restoring, waiting], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if not held.is_set():
                await restoring
                raise CriuError("CRIU ended without asking for the pages")
            others = (Phase.IMAGE_ADDRESSES, Phase.IMAGE_CONTENTS, Phase.STAGED_PAGES, Phase.IMAGE_FILL)
            phases.add(Phase.IMAGE_CRIU, time.monotonic() - begin - sum(map(phases.seconds, others)), begin)
            hosts = place.host_pids()
            Control.make_doors(place)
            engine = Engine(manifest.engine, place, output, manifest.root_pid, manifest.dumped_at, renews)

            async def let_go() -> None:
                go.set()
                gone = place.exit_of(manifest.root_pid)
                await asyncio.wait([restoring, gone], timeout=_LET_GO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not restoring.done():  # of a task that is killed as it is let go CRIU may hear nothing, and waits for ever
                    raise engine.end_error() if gone.done() else CriuError("CRIU did not let the engine go")
                await restoring

            if lost := [process.pid for process in manifest.processes if process.pid not in hosts]:
                raise CriuError(f"pid {lost[0]} of the engine ended while it was restored")
            gpu_pids, whole = [hosts[pid] for pid in manifest.gpu_pids], [hosts[process.pid] for process in manifest.processes]
            of_gpus = gpu_pids, manifest.gpus, _uuids(snapshot)
            return Standby(snapshot, engine, let_go, undo.pop_all(), *of_gpus, processes=whole, wake_bytes=manifest.wake_bytes)

    async def _restored(
        self,
        criu: Criu,
        staged: Staged,
        images: Path,
        place: Place,
        output: Output,
        phases: Phases,
        filled: Callable[[], Awaitable[None]],
    ) -> int:
        """CRIU's part, with what runs beside it. `filled` is called when every page is there; CRIU lets go when that has ended."""
        manifest = staged.snapshot.manifest
        async with contextlib.AsyncExitStack() as begun:
            laid_out = _begun(begun, place.lay_out(staged.directory))
            with phases.phase(Phase.IMAGE_ADDRESSES):
                theirs = await begun.enter_async_context(_addressed(images, place))
            worker = await begun.enter_async_context(self._worker(criu, place, output, manifest.stdio, theirs))
            with phases.phase(Phase.IMAGE_CONTENTS):
                await laid_out
            completed = _begun(begun, place.complete(staged.directory, manifest.fits, self._staging.hashes))

            async def hold() -> None:
                await self._fill(staged, place, phases)
                with phases.phase(Phase.IMAGE_CONTENTS):
                    await completed
                await filled()

            try:
                return await worker.restore(hold)
            except CriuError:
                await completed  # what is wrong with the place says better why
                raise

    @contextlib.asynccontextmanager
    async def _worker(self, criu: Criu, place: Place, output: Output, keys: tuple[str, str], images: Path) -> AsyncIterator[Worker]:
        with output.writers() as fds:
            async with Worker.start(criu, place, dict(zip(keys, fds, strict=True)), images) as worker:
                yield worker

    async def _fill(self, staged: Staged, place: Place, phases: Phases) -> None:
        begin = time.monotonic()
        arena = await asyncio.shield(staged.arriving)
        whole = arena.whole
        with self._huge.on():
            seconds = await arena.fill(place.host_pids())
        phases.add(Phase.IMAGE_FILL, seconds)
        phases.add(Phase.STAGED_PAGES, time.monotonic() - begin - seconds, begin)  # for which it waited
        if whole:
            self.memory_to_process.measured(arena.size, seconds)

    async def start_cold(self, record: EngineRecord, model: str, phases: Phases) -> Engine:
        """Starts the engine's own command. Raises EngineError, PlaceError."""
        async with contextlib.AsyncExitStack() as undo:
            with phases.phase(Phase.IMAGE_SANDBOX):
                shared = (*record.shared, *caches(record.env))
                place: Place = await (self._sandboxes.create(shared) if os.geteuid() == 0 else Rootless.create(record.port))
                await undo.enter_async_context(place)
                output = place.output(model)
                undo.callback(output.close)
            with phases.phase(Phase.HEALTH):
                engine = await Engine.start(record, place, output, for_snapshot=False)
                await engine.wait_healthy()
            undo.pop_all()
            return engine


def _begun(until: contextlib.AsyncExitStack, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
    """Beside what its caller does; it has ended when the stack has."""
    task = asyncio.create_task(work)
    until.push_async_callback(ended, [task])
    return task


@contextlib.asynccontextmanager
async def _addressed(images: Path, place: Place) -> AsyncIterator[Path]:
    """The images, or such as have the place's address in them. Raises OtherAddresses, ImageError."""
    if not place.addresses:
        yield images
        return
    folder = images.with_name(f"{images.name}-{secrets.token_hex(4)}")
    try:
        yield await to_its_end(asyncio.to_thread(readdressed, images, place.addresses, folder))
    finally:
        if folder.exists():
            await to_its_end(asyncio.to_thread(discard, folder))


def _uuids(snapshot: Snapshot) -> tuple[str, ...]:
    return snapshot.manifest.fits.gpus.uuids if snapshot.manifest.fits.gpus else ()


def _dumped(snapshot: Snapshot, given: Sequence[str] | None) -> Suspended:
    """As its image has it."""
    uuids = _uuids(snapshot)
    return Suspended(snapshot.manifest, snapshot.manifest.gpus_awake, uuids, {identity: identity for identity in uuids}, given)
