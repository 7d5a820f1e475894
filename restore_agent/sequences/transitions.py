"""From one of the upper rungs to another, and from there to a serving replica and back.

    standby  →  its tasks are let go, CUDA resumes  →  parked  →  its weights are there, restore-complete  →  serving
    serving  →  quiesced: it lets go of what is lent  →  parked  →  CUDA suspends, its tasks are stopped  →  standby

How a standby is made of a snapshot is restore.py's; who is moved, and when, is decided in rungs.py and idling.py. Weights are on their way
beside everything else. A move that fails in the middle leaves no rung: what was moved is closed, and with it all that it held.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from restore_agent.drivers.criu import CriuError
from restore_agent.drivers.cuda import Cuda, CudaError
from restore_agent.drivers.headroom import Headroom
from restore_agent.drivers.weights import Weights
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.places.processes import has_ended
from restore_agent.sequences.attempt import attempt
from restore_agent.sequences.gpu_choice import GiveWay, GpuChoice, Suspended
from restore_agent.sequences.parked_budget import ParkedBudget
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.staging import Staging
from restore_agent.sequences.standby import Rung, Standby
from restore_agent.snapshots.catalog import Snapshot
from zerowake_shared.background import ended, first_error
from zerowake_shared.huge_pages import HugePages
from zerowake_shared.phases import Phase

_DEMOTE_SECONDS = 10.0  # an engine that does not let go in this time is ended


class Transitions:
    """Moves replicas between running, parked and standby, with what the node has for it."""

    def __init__(
        self, staging: Staging, huge: HugePages, headroom: Headroom, cuda: Cuda | None, weights: Weights, give_way: GiveWay
    ) -> None:
        """`give_way`: asked where GPU memory is short and gpumem has none."""
        self._staging = staging
        self._huge = huge
        self._headroom = headroom
        self._cuda = cuda
        self._weights = weights
        self.gpus = GpuChoice(cuda, weights, give_way)

    async def wake(self, standby: Standby, phases: Phases) -> Engine:
        """From either rung. Raises RestoreFailed; then nothing is left of it."""
        async with _closed_unless_done(standby), attempt(standby.snapshot), self.room_for(standby) as pairs:
            return await self.wake_on(standby, pairs, phases)

    @contextlib.asynccontextmanager
    async def room_for(self, standby: Standby) -> AsyncIterator[Mapping[str, str]]:
        """The GPUs on which it wakes, whose memory is its until the block ends; one in a pod has its pod's alone.

        Raises what `GpuChoice.chosen` does: nothing was begun, and it stands where it stood.
        """
        if standby.rung is Rung.PARKED:
            async with self.gpus.chosen(_parked(standby)):
                yield {gpu: gpu for gpu in standby.gpus}
            return
        self._headroom.give()  # CUDA takes memory of the host's, too
        barred = (
            () if standby.engine.place.is_ours or not self._cuda else [gpu for gpu in self._cuda.gpus().uuids if gpu not in standby.gpus]
        )
        async with self.gpus.chosen(_waiting(standby), barred) as pairs:
            yield pairs

    async def wake_on(self, standby: Standby, pairs: Mapping[str, str], phases: Phases) -> Engine:
        """From either rung, on these GPUs. Raises RestoreFailed; then nothing is left of it."""
        on_their_way = self.weights_on_their_way(standby.snapshot, _waiting(standby), pairs)
        async with _closed_unless_done(standby), attempt(standby.snapshot), on_their_way as weights:
            return await self.finish(standby, weights, pairs, phases)

    @contextlib.asynccontextmanager
    async def weights_on_their_way(
        self, snapshot: Snapshot, tree: Suspended, pairs: Mapping[str, str]
    ) -> AsyncIterator[asyncio.Task[None]]:
        """The task that brings the snapshot's weights to these GPUs, which ends with the block. Awaiting it raises WeightsError."""
        task = asyncio.create_task(self._bring_weights(snapshot, tree, pairs), name="weights")
        try:
            yield task
        finally:
            await ended([task])

    async def finish(self, standby: Standby, weights: asyncio.Task[None], pairs: Mapping[str, str], phases: Phases) -> Engine:
        """From either rung, on these GPUs, with weights on their way. Where that fails it is closed, and what failed is raised."""
        async with _closed_unless_done(standby):
            standby.check_whole()
            if standby.rung is Rung.STANDBY:
                await self._resume(standby, pairs, phases)
            return await self._serve(standby, weights, phases)

    async def park(self, standby: Standby, budget: ParkedBudget) -> None:
        """A standby's GPU state onto a GPU on which there is room for it by the budget, too. Where that is refused, it is a standby still.

        Raises:
            NoGpuMemory: nothing was begun.
            RestoreFailed: nothing is left of it.
        """
        barred = {gpu for gpu, room in budget.left().items() if room < max(standby.gpus.values(), default=0)}
        async with contextlib.AsyncExitStack() as stack:
            pairs = await stack.enter_async_context(self.gpus.chosen(_waiting(standby), barred, give_way=False))
            stack.enter_context(budget.counted({pairs[old]: size for old, size in standby.gpus.items()}))
            async with _closed_unless_done(standby), attempt(standby.snapshot):
                standby.check_whole()
                self._headroom.give()
                await self._resume(standby, pairs, Phases())
                await standby.engine.renew_asleep()
                if standby.engine.place.exit_of(standby.engine.pid).done():
                    raise standby.engine.end_error()

    async def unpark(self, standby: Standby) -> None:
        """Gives back what a parked one holds of its GPUs. Raises RestoreFailed; then nothing is left of it."""
        async with _closed_unless_done(standby), attempt(standby.snapshot):
            standby.check_whole()
            await self._suspend(standby)

    async def demote(self, engine: Engine, snapshot: Snapshot, rung: Rung) -> Standby:
        """A running engine that works on nothing, on that rung: it lets go of what is lent, and for a standby is suspended and stopped.

        Raises RestoreFailed; the engine is of no more use, and is the caller's to close.
        """
        async with attempt(snapshot, _DEMOTE_SECONDS):
            if snapshot.manifest.quiesces:
                await engine.quiesce()
            elif snapshot.manifest.weights:
                raise EngineError("the engine does not take part in the control directory, so it cannot let go of its weights")
            gpu_pids: list[int] = []
            gpus: Mapping[str, int] = {}
            hosts = engine.place.host_pids()
            # CRIU's own process may still be there, about to end: it is none of those that have to be there at the wake, nor is what the
            # engine let end meanwhile.
            known = [hosts[process.pid] for process in snapshot.manifest.processes if process.pid in hosts]
            processes = [host for host in known if not has_ended(host)]
            if self._cuda:
                gpu_pids = self._cuda.holders([host for pid, host in hosts.items() if pid != 1])
                gpus = self._cuda.held(gpu_pids) or engine.gpu_bytes
            undo = contextlib.AsyncExitStack()
            undo.callback(engine.output.close)
            undo.push_async_callback(engine.place.close)
            here = self._cuda.gpus(engine.place.gpus).uuids if self._cuda else ()
            standby = Standby(
                *(snapshot, engine, _nothing, undo, gpu_pids, gpus, here, Rung.PARKED),
                processes=processes,
                places=engine.gpu_places,
                wake_bytes=engine.wake_bytes(),
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

    async def _resume(self, standby: Standby, pairs: Mapping[str, str], phases: Phases) -> None:
        """Lets the held processes go and gives them back what was suspended: from standby to parked."""
        with phases.phase(Phase.IMAGE_WAKE):
            await standby.let_go()
        if standby.gpu_pids:
            if self._cuda is None:
                raise CudaError("the snapshot holds GPU state and this node has no usable GPU")
            # CUDA reads all of its state, also the zeros that were left out: with huge pages on those are one page of zeros for 2 MiB.
            with self._huge.on():
                took = await self._cuda.resume(standby.gpu_pids, pairs)
            phases.add(Phase.CUDA_RESTORE, took.restore, ended_before=took.unlock)
            phases.add(Phase.CUDA_UNLOCK, took.unlock)
        standby.stands_on(pairs)

    async def _serve(self, standby: Standby, weights: asyncio.Task[None], phases: Phases) -> Engine:
        """Gives a parked one back what was lent, and takes it out of the standby, whose end it outlives."""
        engine, manifest = standby.engine, standby.snapshot.manifest
        engine.gpu_bytes = standby.gpus
        engine.gpu_places = standby.places
        moved = {old: new for old, new in standby.moved.items() if old != new}
        # An engine waits for regions that are on their way, though not as long as a disk may take.
        soon = bool(manifest.weights) and self._weights.view.rung(manifest.weights, manifest.tenant) >= WeightsRung.MEMORY
        if soon:
            engine.woken(moved)
        if manifest.weights:
            # They were on their way all the while; what is waited for here is what they took longer.
            with phases.phase(Phase.WEIGHTS):
                await weights
        if not soon:
            engine.woken(moved)
        await engine.renewed()
        if engine.place.exit_of(engine.pid).done():
            raise CriuError(str(engine.end_error()))
        standby.undo.pop_all()
        return engine

    async def _bring_weights(self, snapshot: Snapshot, tree: Suspended, pairs: Mapping[str, str]) -> None:
        """Each GPU's, all of them at once. Raises WeightsError."""
        with first_error():
            async with asyncio.TaskGroup() as group:
                for region in await self._staging.regions(snapshot):
                    group.create_task(self._weights.fill(region, tree.device(region.record, pairs), snapshot.manifest.tenant, of=snapshot))


@contextlib.asynccontextmanager
async def _closed_unless_done(standby: Standby) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await standby.close()
        raise


async def _nothing() -> None:
    """Lets go of tasks that nothing holds."""


def _waiting(standby: Standby) -> Suspended:
    needed = {gpu: size + standby.wake_bytes.get(gpu, 0) for gpu, size in standby.gpus.items()}
    return Suspended(standby.snapshot.manifest, needed, standby.before, standby.places, standby.engine.place.gpus)


def _parked(standby: Standby) -> Suspended:
    """What its wake takes, of the GPUs on which it is. Of any other an engine may say what it likes."""
    needed = {gpu: standby.wake_bytes[gpu] for gpu in standby.gpus if gpu in standby.wake_bytes}
    return Suspended(standby.snapshot.manifest, needed, tuple(needed), standby.places, tuple(needed), "where it is parked")
