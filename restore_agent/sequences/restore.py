"""From a snapshot to a serving replica, at once or in parts with a standby between them, which may be parked.

    place    →  CRIU: skeleton  →  (it holds every task)  →  fill pages  ┃  CRIU lets go  →  CUDA  ┃  restore-complete
       staging into memory, where it does not stand there yet,           ┃                          ┃
       runs beside all of it                                          standby                    parked
                                                        weights into lent memory run beside what is left to do

Restoring is an optimisation, never a new way to fail: whatever goes wrong names a reason, and the engine is started cold where the caller
gave its command. The first held request is a restored replica's proof, so it is not asked for its health here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from restore_agent.drivers.criu import Criu, CriuError, Worker
from restore_agent.drivers.cuda import Cuda, CudaError
from restore_agent.drivers.headroom import Headroom
from restore_agent.drivers.meminfo import available_memory
from restore_agent.drivers.weights import Weights
from restore_agent.engine.control import Control
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.errors import FAILURES, AgentError, reason_of
from restore_agent.places.place import Output, Place
from restore_agent.places.rootless import Rootless
from restore_agent.places.sandbox import Sandbox
from restore_agent.places.sandboxes import Sandboxes
from restore_agent.places.shared_folders import caches
from restore_agent.sequences.gpu_choice import GiveWay, GpuChoice, Suspended
from restore_agent.sequences.parked_budget import ParkedBudget
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.staging import SPARE_BYTES, Bandwidth, NoMemory, Staged, Staging
from restore_agent.sequences.standby import Rung, Standby
from restore_agent.snapshots.compatibility import check_gpus
from restore_agent.snapshots.manifest import EngineRecord
from restore_agent.snapshots.store import Snapshot
from zerowake_shared.huge_pages import HugePages

_DEMOTE_SECONDS = 10.0  # an engine that does not let go in this time is ended
_LET_GO_SECONDS = 10.0  # CRIU's last step takes milliseconds
OpenPlace = Callable[[], Awaitable[Place]]  # makes, or opens, what a replica is restored into


class RestoreFailed(AgentError):
    """A replica could not be restored; `reason` is one of a few keys, the text says what happened."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


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
        weights: Weights,
        give_way: GiveWay,
    ) -> None:
        """Without `criu`, every restore fails with `why_no_criu`. `give_way`: asked where GPU memory is short and gpumem has none."""
        self._criu = criu
        self._why_no_criu = why_no_criu
        self._sandboxes = sandboxes
        self._staging = staging
        self._huge = huge
        self._headroom = headroom
        self._cuda = cuda
        self._weights = weights
        self._gpus = GpuChoice(cuda, weights, give_way)
        self.memory_to_process = Bandwidth()
        self.overhead: dict[str, float] = {}  # digest → seconds of a restore beside its fill, smoothed

    async def restore(
        self, snapshot: Snapshot, phases: Phases, open_place: OpenPlace | None = None, given: Sequence[str] | None = None
    ) -> Engine:
        """`given`: the place's own GPUs (`Place.gpus`). Raises RestoreFailed; then nothing is left of it."""
        with self._named(snapshot):
            criu = self._usable(snapshot)
            if given is not None and self._cuda:
                check_gpus(snapshot.manifest.fits.gpus, self._cuda.gpus(given))
            async with asyncio.timeout(_deadline(snapshot)):
                with self._staging.hold(snapshot) as staged:
                    tree = _dumped(snapshot, given)
                    async with self._gpus.chosen(tree) as pairs:
                        weights = asyncio.create_task(self._bring_weights(snapshot, tree, pairs), name="weights")
                        try:
                            standby = await self._hold(criu, snapshot, staged, phases, open_place or self._sandbox(snapshot))
                            async with _closed_unless_done(standby):
                                standby.check_whole()
                                await self._resume(standby, pairs, phases)
                                engine = await self._serve(standby, weights, phases)
                        finally:
                            await _ended(weights)
            overhead = phases.total - sum(phases.seconds(moving) for moving in ("image.fill", "staged.pages", "weights"))
            before = self.overhead.get(snapshot.digest, overhead)
            self.overhead[snapshot.digest] = before + 0.3 * (overhead - before)
            if open_place is None:
                self.make_ready(snapshot)
            return engine

    def make_ready(self, snapshot: Snapshot) -> None:
        """For the next restore of it on this machine: a sandbox. Returns at once."""
        if self._criu and not snapshot.manifest.is_of_container:
            self._sandboxes.make_ready(snapshot.manifest.engine.shared)

    async def prepare(self, snapshot: Snapshot, open_place: OpenPlace | None = None) -> Standby:
        """Restores a replica as far as it costs no GPU memory. Raises RestoreFailed; then nothing is left of it."""
        with self._named(snapshot):
            criu = self._usable(snapshot)
            if (free := available_memory()) < snapshot.manifest.page_bytes + SPARE_BYTES:
                needed = snapshot.manifest.page_bytes >> 20
                raise NoMemory(f"a standby needs {needed} MiB of memory and {free >> 20} MiB are free: drop another, or end replicas")
            async with asyncio.timeout(_deadline(snapshot)):
                with self._staging.hold(snapshot) as staged:
                    return await self._hold(criu, snapshot, staged, Phases(), open_place or self._sandbox(snapshot))

    async def wake(self, standby: Standby, phases: Phases) -> Engine:
        """From either rung. Raises RestoreFailed; then nothing is left of it."""
        async with _closed_unless_done(standby):
            with self._named(standby.snapshot):
                async with asyncio.timeout(_deadline(standby.snapshot)), self.room_for(standby) as pairs:
                    return await self.wake_on(standby, pairs, phases)

    @contextlib.asynccontextmanager
    async def room_for(self, standby: Standby) -> AsyncIterator[Mapping[str, str]]:
        """The GPUs on which it wakes, whose memory is its until the block ends; one in a pod has its pod's alone.

        Raises what `GpuChoice.chosen` does: nothing was begun, and it stands where it stood.
        """
        if standby.rung is Rung.PARKED:
            yield {gpu: gpu for gpu in standby.gpus}
            return
        self._headroom.give()  # CUDA takes memory of the host's, too
        barred = (
            () if standby.engine.place.is_ours or not self._cuda else [gpu for gpu in self._cuda.gpus().uuids if gpu not in standby.gpus]
        )
        async with self._gpus.chosen(_waiting(standby), barred) as pairs:
            yield pairs

    async def wake_on(self, standby: Standby, pairs: Mapping[str, str], phases: Phases) -> Engine:
        """From either rung, on these GPUs. Raises RestoreFailed; then nothing is left of it."""
        snapshot = standby.snapshot
        async with _closed_unless_done(standby):
            with self._named(snapshot):
                async with asyncio.timeout(_deadline(snapshot)):
                    standby.check_whole()
                    weights = asyncio.create_task(self._bring_weights(snapshot, _waiting(standby), pairs), name="weights")
                    try:
                        if standby.rung is Rung.STANDBY:
                            await self._resume(standby, pairs, phases)
                        return await self._serve(standby, weights, phases)
                    finally:
                        await _ended(weights)

    async def park(self, standby: Standby, budget: ParkedBudget) -> None:
        """A standby's GPU state onto a GPU on which there is room for it by the budget, too. Where that is refused, it is a standby still.

        Raises:
            NoGpuMemory: nothing was begun.
            RestoreFailed: nothing is left of it.
        """
        snapshot = standby.snapshot
        barred = {gpu for gpu, room in budget.left().items() if room < max(standby.gpus.values(), default=0)}
        async with contextlib.AsyncExitStack() as stack:
            pairs = await stack.enter_async_context(self._gpus.chosen(_waiting(standby), barred, give_way=False))
            stack.enter_context(budget.counted({pairs[old]: size for old, size in standby.gpus.items()}))
            async with _closed_unless_done(standby):
                with self._named(snapshot):
                    async with asyncio.timeout(_deadline(snapshot)):
                        standby.check_whole()
                        self._headroom.give()
                        await self._resume(standby, pairs, Phases())
                    if standby.engine.place.exit_of(standby.engine.pid).done():
                        raise standby.engine.end_error()

    async def unpark(self, standby: Standby) -> None:
        """Gives back what a parked one holds of its GPUs. Raises RestoreFailed; then nothing is left of it."""
        async with _closed_unless_done(standby):
            with self._named(standby.snapshot):
                async with asyncio.timeout(_deadline(standby.snapshot)):
                    standby.check_whole()
                    await self._suspend(standby)

    async def demote(self, engine: Engine, snapshot: Snapshot, rung: Rung) -> Standby:
        """A running engine that works on nothing, on that rung: it lets go of what is lent, and for a standby is suspended and stopped.

        Raises RestoreFailed; the engine is of no more use, and is the caller's to close.
        """
        with self._named(snapshot):
            async with asyncio.timeout(_DEMOTE_SECONDS):
                if snapshot.manifest.quiesces:
                    await engine.quiesce()
                elif snapshot.manifest.weights:
                    raise EngineError("the engine does not take part in the control directory, so it cannot let go of its weights")
                gpu_pids: list[int] = []
                gpus: Mapping[str, int] = {}
                processes = [host for pid, host in engine.place.host_pids().items() if pid != 1]
                if self._cuda:
                    gpu_pids = self._cuda.holders(processes)
                    gpus = self._cuda.held(gpu_pids) or engine.gpu_bytes
                undo = contextlib.AsyncExitStack()
                undo.callback(engine.output.close)
                undo.push_async_callback(engine.place.close)
                here = self._cuda.gpus(engine.place.gpus).uuids if self._cuda else ()
                standby = Standby(
                    *(snapshot, engine, _nothing, undo, gpu_pids, gpus, here, Rung.PARKED), processes=processes, places=engine.gpu_places
                )
                if rung is Rung.STANDBY:
                    await self._suspend(standby)
                return standby

    async def _suspend(self, standby: Standby) -> None:
        """Off the GPU, and stopped: from parked to standby."""
        engine = standby.engine
        gpus: Mapping[str, int] = {}
        if self._cuda:
            # CUDA maps now what it keeps the state in, and reads it at the resume, which huge pages make 10-17 % faster.
            with self._huge.on():
                gpus = await self._cuda.suspend(standby.gpu_pids, engine.place.gpus)
        await asyncio.to_thread(engine.stop)
        if engine.place.exit_of(engine.pid).done():
            raise engine.end_error()

        async def let_go() -> None:
            engine.go_on()

        standby.let_go, standby.gpus = let_go, gpus
        standby.before = self._cuda.gpus(engine.place.gpus).uuids if self._cuda else ()
        standby.rung = Rung.STANDBY

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

    @contextlib.contextmanager
    def _named(self, snapshot: Snapshot) -> Iterator[None]:
        try:
            yield
        except RestoreFailed:
            raise
        except FAILURES as error:
            raise RestoreFailed(reason_of(error), f"snapshot {snapshot}: {str(error) or 'it took too long and was given up'}") from error

    def _sandbox(self, snapshot: Snapshot) -> Callable[[], Awaitable[Sandbox]]:
        return functools.partial(self._sandboxes.create, snapshot.manifest.engine.shared)

    async def _hold(self, criu: Criu, snapshot: Snapshot, staged: Staged, phases: Phases, open_place: OpenPlace) -> Standby:
        """CRIU's part and the fill, up to the moment at which every page is there and every task waits.

        snapshot: as it was asked for: `staged` may know it by the folder that it was proved in, which is gone.
        """
        manifest = snapshot.manifest
        self._headroom.give()
        async with contextlib.AsyncExitStack() as undo:
            with phases.phase("image.sandbox"):
                place = await open_place()
                undo.push_async_exit(place)
                output = place.output(manifest.model)
                undo.callback(output.close)
            with phases.phase("staged"):
                images = await asyncio.shield(staged.skeleton)
            begin = time.monotonic()
            held, go = asyncio.Event(), asyncio.Event()

            async def hold() -> None:
                await self._fill(staged, place, phases)
                held.set()
                await go.wait()

            async def restore() -> int:
                async with self._worker(criu, place, output, manifest.stdio, images) as worker:
                    await place.lay_out(staged.directory, manifest.fits)  # while CRIU starts, which then waits for its request
                    return await worker.restore(hold)

            restoring = asyncio.create_task(restore(), name=f"CRIU of {snapshot}")
            undo.push_async_callback(_ended, restoring)
            waiting = asyncio.create_task(held.wait())
            try:
                await asyncio.wait([restoring, waiting], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if not held.is_set():
                await restoring
                raise CriuError("CRIU ended without asking for the pages")
            phases.add("image.criu", time.monotonic() - begin - phases.seconds("staged.pages") - phases.seconds("image.fill"))
            hosts = place.host_pids()
            Control.make_doors(place)
            engine = Engine(manifest.engine, place, output, manifest.root_pid)

            async def let_go() -> None:
                go.set()
                ended = place.exit_of(manifest.root_pid)
                await asyncio.wait([restoring, ended], timeout=_LET_GO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not restoring.done():  # of a task that is killed as it is let go CRIU may hear nothing, and waits for ever
                    raise engine.end_error() if ended.done() else CriuError("CRIU did not let the engine go")
                await restoring

            if gone := [process.pid for process in manifest.processes if process.pid not in hosts]:
                raise CriuError(f"pid {gone[0]} of the engine ended while it was restored")
            gpu_pids, whole = [hosts[pid] for pid in manifest.gpu_pids], [hosts[process.pid] for process in manifest.processes]
            return Standby(snapshot, engine, let_go, undo.pop_all(), gpu_pids, manifest.gpus, _uuids(snapshot), processes=whole)

    async def _resume(self, standby: Standby, pairs: Mapping[str, str], phases: Phases) -> None:
        """Lets the held processes go and gives them back what was suspended: from standby to parked."""
        with phases.phase("image.wake"):
            await standby.let_go()
        if standby.gpu_pids:
            if self._cuda is None:
                raise CudaError("the snapshot holds GPU state and this node has no usable GPU")
            # CUDA reads all of its state, also the zeros that were left out: with huge pages on those are one page of zeros for 2 MiB.
            with self._huge.on():
                took = await self._cuda.resume(standby.gpu_pids, pairs)
            phases.add("cuda.restore", took.restore)
            phases.add("cuda.unlock", took.unlock)
        standby.stands_on(pairs)

    async def _serve(self, standby: Standby, weights: asyncio.Task[None], phases: Phases) -> Engine:
        """Gives a parked one back what was lent, and takes it out of the standby, whose end it outlives."""
        engine = standby.engine
        if standby.snapshot.manifest.weights:
            # They were on their way all the while; what is waited for here is what they took longer.
            with phases.phase("weights"):
                await weights
        engine.gpu_bytes = standby.gpus
        engine.gpu_places = standby.places
        engine.woken({old: new for old, new in standby.moved.items() if old != new})
        if engine.place.exit_of(engine.pid).done():
            raise CriuError(str(engine.end_error()))
        standby.undo.pop_all()
        return engine

    async def _bring_weights(self, snapshot: Snapshot, tree: Suspended, pairs: Mapping[str, str]) -> None:
        """Each GPU's, all of them at once. Raises WeightsError."""
        try:
            async with asyncio.TaskGroup() as group:
                for region in await self._staging.regions(snapshot):
                    group.create_task(self._weights.fill(region, tree.device(region.record, pairs), snapshot.manifest.tenant))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

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
        phases.add("image.fill", seconds)
        phases.add("staged.pages", time.monotonic() - begin - seconds)  # for which it waited
        if whole:
            self.memory_to_process.measured(arena.size, seconds)

    async def start_cold(self, record: EngineRecord, model: str, phases: Phases) -> Engine:
        """Starts the engine's own command. Raises EngineError, PlaceError."""
        async with contextlib.AsyncExitStack() as undo:
            with phases.phase("image.sandbox"):
                shared = (*record.shared, *caches(record.env))
                place: Place = await (self._sandboxes.create(shared) if os.geteuid() == 0 else Rootless.create(record.port))
                await undo.enter_async_context(place)
                output = place.output(model)
                undo.callback(output.close)
            with phases.phase("health"):
                engine = await Engine.start(record, place, output, for_snapshot=False)
                await engine.wait_healthy()
            undo.pop_all()
            return engine


@contextlib.asynccontextmanager
async def _closed_unless_done(standby: Standby) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await standby.close()
        raise


async def _nothing() -> None:
    """Lets go of tasks that nothing holds."""


def _deadline(snapshot: Snapshot) -> float:
    """A minute, and for huge images a second for each 100 MiB: CRIU has been seen to spin for ever on a torn image."""
    return 60.0 + snapshot.manifest.image_bytes / (100 << 20)


def _uuids(snapshot: Snapshot) -> tuple[str, ...]:
    return snapshot.manifest.fits.gpus.uuids if snapshot.manifest.fits.gpus else ()


def _dumped(snapshot: Snapshot, given: Sequence[str] | None) -> Suspended:
    """As its image has it."""
    uuids = _uuids(snapshot)
    return Suspended(snapshot.manifest, snapshot.manifest.gpus, uuids, {identity: identity for identity in uuids}, given)


def _waiting(standby: Standby) -> Suspended:
    return Suspended(standby.snapshot.manifest, standby.gpus, standby.before, standby.places, standby.engine.place.gpus)


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
