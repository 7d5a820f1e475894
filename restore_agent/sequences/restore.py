"""From a snapshot to a serving replica, at once or in two parts with a standby between them.

    place    →  CRIU: skeleton  →  (it holds every task)  →  fill pages  ┃  CRIU lets go  →  CUDA  →  restore-complete
       staging into memory, where it does not stand there yet,           ┃     weights into lent memory run beside all of it
       runs beside all of it                                          standby

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
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.errors import FAILURES, AgentError, reason_of
from restore_agent.places.place import Output, Place
from restore_agent.places.rootless import Rootless
from restore_agent.places.sandbox import Sandbox
from restore_agent.places.sandboxes import Sandboxes
from restore_agent.places.shared_folders import caches
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.placement import NoGpuMemory, choose_gpus
from restore_agent.sequences.staging import SPARE_BYTES, Bandwidth, NoMemory, Staged, Staging
from restore_agent.sequences.standby import Standby
from restore_agent.snapshots.manifest import EngineRecord, Manifest
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
    ) -> None:
        """Without `criu`, every restore fails with `why_no_criu`."""
        self._criu = criu
        self._why_no_criu = why_no_criu
        self._sandboxes = sandboxes
        self._staging = staging
        self._huge = huge
        self._headroom = headroom
        self._cuda = cuda
        self._weights = weights
        self.memory_to_process = Bandwidth()
        self.overhead: dict[str, float] = {}  # digest → seconds of a restore beside its fill, smoothed

    async def restore(self, snapshot: Snapshot, phases: Phases, open_place: OpenPlace | None = None) -> Engine:
        """Raises RestoreFailed; then nothing is left of it."""
        with self._named(snapshot):
            criu = self._usable(snapshot)
            async with asyncio.timeout(_deadline(snapshot)):
                with self._staging.hold(snapshot) as staged:
                    async with self._gpus(snapshot.manifest, snapshot.manifest.gpus, _uuids(snapshot)) as pairs:
                        device = _device(pairs, snapshot.manifest.gpus)
                        weights = asyncio.create_task(self._bring_weights(snapshot, device), name="weights")
                        try:
                            standby = await self._hold(criu, staged, phases, open_place or self._sandbox(snapshot))
                            engine = await self._wake(standby, pairs, weights, phases)
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
                    return await self._hold(criu, staged, Phases(), open_place or self._sandbox(snapshot))

    async def wake(self, standby: Standby, phases: Phases) -> Engine:
        """Raises RestoreFailed; then nothing is left of it."""
        with self._named(standby.snapshot):
            self._headroom.give()  # CUDA takes memory of the host's, too
            try:
                async with asyncio.timeout(_deadline(standby.snapshot)):
                    async with self._gpus(standby.snapshot.manifest, standby.gpus, standby.before) as pairs:
                        weights = asyncio.create_task(self._bring_weights(standby.snapshot, _device(pairs, standby.gpus)))
                        try:
                            return await self._wake(standby, pairs, weights, phases)
                        finally:
                            await _ended(weights)
            except BaseException:
                await standby.close()
                raise

    async def demote(self, engine: Engine, snapshot: Snapshot) -> Standby:
        """A running engine that works on nothing, as a standby: it lets go of what is lent to it, is suspended on the GPU, and is stopped.

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
                if self._cuda:
                    gpu_pids = self._cuda.holders(host for pid, host in engine.place.host_pids().items() if pid != 1)
                    # CUDA maps now what it keeps the state in, and reads it at the resume, which huge pages make 10-17 % faster.
                    with self._huge.on():
                        gpus = await self._cuda.suspend(gpu_pids)
                await asyncio.to_thread(engine.stop)

            async def wake() -> None:
                engine.go_on()

            undo = contextlib.AsyncExitStack()
            undo.callback(engine.output.close)
            undo.push_async_callback(engine.place.close)
            here = self._cuda.gpus().uuids if self._cuda else ()
            return Standby(snapshot, engine, wake, undo, gpu_pids, gpus, here)

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

    async def _hold(self, criu: Criu, staged: Staged, phases: Phases, open_place: OpenPlace) -> Standby:
        """CRIU's part and the fill, up to the moment at which every page is there and every task waits."""
        snapshot, manifest = staged.snapshot, staged.snapshot.manifest
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
            engine = Engine(manifest.engine, place, output, manifest.root_pid)

            async def wake() -> None:
                go.set()
                ended = place.exit_of(manifest.root_pid)
                await asyncio.wait([restoring, ended], timeout=_LET_GO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not restoring.done():  # of a task that is killed as it is let go CRIU may hear nothing, and waits for ever
                    raise engine.end_error() if ended.done() else CriuError("CRIU did not let the engine go")
                await restoring

            return Standby(
                snapshot, engine, wake, undo.pop_all(), [hosts[pid] for pid in manifest.gpu_pids], manifest.gpus, _uuids(snapshot)
            )

    async def _wake(self, standby: Standby, pairs: Mapping[str, str], weights: asyncio.Task[None], phases: Phases) -> Engine:
        """Lets the held processes go and gives back to them what was suspended or lent. Where that fails, they are ended."""
        engine = standby.engine
        async with standby.undo as undo:
            with phases.phase("image.wake"):
                await standby.wake()
            if standby.gpu_pids:
                if self._cuda is None:
                    raise CudaError("the snapshot holds GPU state and this node has no usable GPU")
                # CUDA reads all of its state, also the zeros that were left out: with huge pages on those are one page of zeros for 2 MiB.
                with self._huge.on():
                    took = await self._cuda.resume(standby.gpu_pids, pairs)
                phases.add("cuda.restore", took.restore)
                phases.add("cuda.unlock", took.unlock)
            if standby.snapshot.manifest.weights:
                # They were on their way all the while; what is waited for here is what they took longer.
                with phases.phase("weights"):
                    await weights
            engine.woken({old: new for old, new in pairs.items() if old != new})
            if engine.place.exit_of(engine.pid).done():
                raise CriuError(str(engine.end_error()))
            undo.pop_all()
        return engine

    @contextlib.asynccontextmanager
    async def _gpus(self, manifest: Manifest, needed: Mapping[str, int], before: Sequence[str]) -> AsyncIterator[dict[str, str]]:
        """Chooses the GPUs, and counts what will be used of them as taken until the block ends."""
        if not needed:
            yield {}
            return
        if self._cuda is None:
            raise CudaError("the snapshot holds GPU state and this node has no usable GPU")
        here = self._cuda.gpus().uuids
        resident = await self._weights.resident(manifest) if len(here) > 1 else ()
        try:
            pairs = choose_gpus(needed, before, here, self._cuda.free(), resident)
        except NoGpuMemory as error:
            if not await self._weights.make_room(error.lacking):
                raise
            pairs = choose_gpus(needed, before, here, self._cuda.free(), resident)
        with self._cuda.promised({pairs[old]: size for old, size in needed.items()}):
            yield pairs

    async def _bring_weights(self, snapshot: Snapshot, device: str) -> None:
        for region in await self._staging.regions(snapshot):
            await self._weights.fill(region, device)

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


def _deadline(snapshot: Snapshot) -> float:
    """A minute, and for huge images a second for each 100 MiB: CRIU has been seen to spin for ever on a torn image."""
    return 60.0 + snapshot.manifest.image_bytes / (100 << 20)


def _uuids(snapshot: Snapshot) -> tuple[str, ...]:
    return snapshot.manifest.fits.gpus.uuids if snapshot.manifest.fits.gpus else ()


def _device(pairs: Mapping[str, str], used: Mapping[str, int]) -> str:
    """Where the weights belong: on the GPU that the processes use most; empty: they use none."""
    return pairs[max(used, key=lambda each: used[each])] if used else ""


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
