"""One node: its store, staging, replicas and sequences, wired together; and the stream of everything that changes on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from restore_agent.drivers.criu import Criu, CriuError
from restore_agent.drivers.cuda import Cuda, CudaError, NodeGpu
from restore_agent.drivers.headroom import Headroom
from restore_agent.drivers.meminfo import available_memory, total_memory
from restore_agent.drivers.weights import Weights
from restore_agent.engine.engine import Engine
from restore_agent.places import layer
from restore_agent.places.container import Container
from restore_agent.places.container_error import ContainerError
from restore_agent.places.sandboxes import Sandboxes
from restore_agent.places.shared_folders import unshared
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.capture import Captured, Capturer, CaptureRequest, Progress
from restore_agent.sequences.changes import Change, Changes, Removed
from restore_agent.sequences.disk_budget import DiskBudget
from restore_agent.sequences.idling import Idling
from restore_agent.sequences.inventory import Inventory
from restore_agent.sequences.memory_budget import NoMemory, all_of_it
from restore_agent.sequences.observer import Observer, capture_told
from restore_agent.sequences.parked_budget import Share, a_tenth
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import Origin, Replica, Replicas, State
from restore_agent.sequences.restore import OpenPlace, Restorer
from restore_agent.sequences.returning_weights import ReturningWeights
from restore_agent.sequences.rungs import Rungs
from restore_agent.sequences.second_best import SecondBest
from restore_agent.sequences.sleep_notes import SleepNotes
from restore_agent.sequences.staging import Staging
from restore_agent.sequences.standby import Rung, Standbys
from restore_agent.sequences.transitions import Transitions
from restore_agent.sequences.travel import Travel
from restore_agent.sequences.working_criu import working_criu
from restore_agent.snapshots.catalog import NotFound, Snapshot, Unreadable
from restore_agent.snapshots.manifest import EngineRecord
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unfit import Unfit
from zerowake_shared.background import first_error, kept, kept_beside
from zerowake_shared.huge_pages import HugePages
from zerowake_shared.phases import Phase

_CRIU_LOG = "criu.log"  # in the state folder: what CRIU said where it failed
_KDAT = "criu.kdat"  # CRIU's kernel probe, kept in memory: it must not outlive a boot
_PRESSURE_SECONDS = 1.0  # between two looks at the node's memory while there are standbys
_PRESSURE_SHARE = 20  # under a twentieth of the memory available, standbys go
_LOG = logging.getLogger("zerowake.agent")


class Node:
    """Use `async with Node.open(name, state, memory, gpumem, observer)`."""

    def __init__(
        self,
        name: str,
        store: Store,
        memory: Path,
        weights: Weights,
        criu: Criu | CriuError,
        observer: Observer,
        parked: Share = a_tenth,
        images: Share = all_of_it,
        disk: Share = all_of_it,
    ) -> None:
        self.name = name
        self.observer = observer
        self.weights = weights
        self.store = store
        self.criu = criu if isinstance(criu, Criu) else None
        why = "" if isinstance(criu, Criu) else str(criu)
        self._sandboxes = sandboxes = _sandboxes(store, memory, weights)
        self.changes = Changes()
        try:
            cuda = Cuda.find()
        except CudaError as error:
            cuda = None
            _LOG.warning("snapshots with GPU state cannot be taken or restored here: %s", error)
        self._cuda = cuda
        gpus = cuda.gpus() if cuda else None
        self.headroom = Headroom()
        version = self.criu.version if self.criu else "0"
        self.staging = Staging(store, memory, version, gpus, self.headroom, self._changed, images, self._stands_by, observer)
        huge = HugePages.of_processes(store.state)
        transitions = Transitions(self.staging, huge, self.headroom, cuda, self.weights, self._give_way)
        self.transitions = transitions
        self.restorer = Restorer(self.criu, why, sandboxes, self.staging, huge, self.headroom, cuda, transitions)
        self.replicas = Replicas(self._changed, self._give_room_back)
        self.standbys = Standbys(self._changed, transitions.unpark)
        self.idling = Idling(transitions, self.replicas, SleepNotes(store.state / "sleepers"))
        self.rungs = Rungs(self.restorer, transitions, self.standbys, self.replicas, store, cuda, weights.view, parked, self.idling)
        self.travel = Travel(store, self._changed, observer)
        weights.on_stage(functools.partial(observer.staged, "gpu"))
        self.travel.disk = self.disk = DiskBudget(store, disk, self._is_used, self.travel.stands_elsewhere, self.remove)
        self.inventory = Inventory(
            store, self.staging, self.travel, weights, cuda, self.rungs.held, lambda: self._restoring > 0, self._changed
        )
        self.returning = ReturningWeights(self.staging, weights, self._asleep, lambda: self._gpus_here, self.inventory.look_at_weights)
        self.travel.unfit = self.disk.unfit = self.unfit = Unfit(store)
        self.second_best = SecondBest(store, sandboxes.checkpoints, self.unfit)
        self._restoring = 0  # restores under way: each may have been promised memory that gpumem gave up
        self._why_no_criu = why
        make_room = functools.partial(self.disk.make_room, coming=self.travel.bytes_to_come)
        self._capturer = (
            Capturer(self.criu, cuda, self.weights, sandboxes, store, self.staging, self.restorer, make_room) if self.criu else None
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        name: str,
        state: Path,
        memory: Path,
        gpumem: Path,
        observer: Observer,
        parked: Share = a_tenth,
        keys: Path | None = None,
        images: Share = all_of_it,
        disk: Share = all_of_it,
    ) -> AsyncIterator[Node]:
        """`state`: the snapshots' folder; `memory`: a tmpfs; `gpumem`: its server's socket; `parked`: what parked engines may hold of each
        GPU; `keys`: the keyring's folder, if it is not the state folder's own; `images`: what staged images may take of the node's memory;
        `disk`: what snapshots may take of the state folder's.

        Raises StoreBusy, UnusableKey, OSError.
        """
        store = await asyncio.to_thread(Store, state, keys)
        try:
            weights = Weights(gpumem)
            sandboxes = _sandboxes(store, memory, weights)
            await asyncio.to_thread(_prepare, sandboxes)
            criu = await working_criu(sandboxes, store.state / _CRIU_LOG)
            node = cls(name, store, memory, weights, criu, observer, parked, images, disk)
            returning = functools.partial(node.returning.run, lambda: node._restoring > 0)
            pressure = asyncio.create_task(kept(node._yield_to_pressure, "memory pressure", _LOG), name="memory pressure")
            try:
                async with node.inventory.watched(), kept_beside(returning, "weights that return", _LOG):
                    yield node
            finally:
                pressure.cancel()
                await node.standbys.close()
                await node.replicas.close()
                await node._sandboxes.close()
                await node.staging.close()
                await node.headroom.close()
                node.unfit.close()
        finally:
            store.close()

    async def restore(
        self, model: str, snapshot: Snapshot | RestoreFailed | None, cold: EngineRecord | None, activation: str, phases: Phases
    ) -> tuple[Replica, RestoreFailed | None]:
        """One ready replica, restored or, where that is impossible, started: by `cold`, else by the manifest; and why it was not restored.

        Raises:
            RestoreFailed: and there is neither.
            EngineError, PlaceError: it could not be started either.
        """
        failure = snapshot if isinstance(snapshot, RestoreFailed) else None
        if isinstance(snapshot, Snapshot) and cold and (others := unshared(cold.shared, snapshot.manifest.engine.shared)):
            _LOG.warning(
                "snapshot %s was taken without %s in `shared:`, and its replicas have their own copy of that; take it again with --shared",
                *(snapshot, ", ".join(others)),
            )
        if isinstance(snapshot, Snapshot):
            try:
                with self._makes_one(snapshot):
                    stood = self.staging.found(snapshot.digest)
                    origin, engine = await self._restore(snapshot, phases)
                    replica = self.replicas.add(model, snapshot, origin, engine, phases)
                    self.observer.restored(model, origin, replica.phases, stood if origin is Origin.RESTORED else origin.value)
                    self._log(activation, replica, phases)
                    return replica, None
            except RestoreFailed as error:
                failure = error
            await self._give_room_back()
        if failure:
            self.observer.fell_back(model, failure.reason)
            _LOG.warning("activation %s: %s is not restored (%s): %s", activation or "-", model, failure.reason, failure)
            if cold is None and isinstance(snapshot, Snapshot):
                cold = snapshot.manifest.engine
            if cold is None:
                raise failure
        assert cold is not None
        useful = snapshot if isinstance(snapshot, Snapshot) else failure.unfit if failure else None
        if useful:
            await self.second_best.lay_out(useful, cold, phases)
        engine = await self.restorer.start_cold(cold, model, phases)
        replica = self.replicas.add(model, None, Origin.COLD, engine, phases, detail=str(failure or ""))
        self.observer.started_cold(model)
        self._log(activation, replica, phases)
        return replica, failure

    async def _restore(self, snapshot: Snapshot, phases: Phases) -> tuple[Origin, Engine]:
        """By the standby where there is one. Raises RestoreFailed."""
        standby = await self.standbys.take(snapshot.digest)
        if standby and standby.has_overslept:
            await standby.close()
        elif standby:
            origin = Origin.PARKED if standby.rung is Rung.PARKED else Origin.STANDBY
            try:
                engine = await self.transitions.wake(standby, phases)
                self.staging.used(snapshot)
                return origin, engine
            except RestoreFailed as error:
                _LOG.warning("what waited of %s did not wake (%s), restoring another replica: %s", snapshot, error.reason, error)
        return Origin.RESTORED, await self.restorer.restore(snapshot, phases)

    async def restore_into(self, container: Container, model: str, snapshot: Snapshot, phases: Phases, replica_id: str = "") -> Replica:
        """A replica of this id (empty: a new one) in a container that waits. Raises RestoreFailed; then it waits again."""
        stood = "remote" if phases.seconds(Phase.FETCH) else self.staging.found(snapshot.digest)
        try:
            with self._makes_one(snapshot):
                engine = await self.restorer.restore(snapshot, phases, container.open, container.gpus)
                container.keep(engine.pid, engine.record.port)
                replica = self.replicas.add(model, snapshot, Origin.RESTORED, engine, phases, replica_id=replica_id)
                self.observer.restored(model, replica.origin, replica.phases, stood)
        except (RestoreFailed, ContainerError) as error:
            failure = error if isinstance(error, RestoreFailed) else RestoreFailed("sandbox-failed", f"snapshot {snapshot}: {error}")
            self.observer.fell_back(model, failure.reason)
            raise failure from None
        self._log("", replica, phases)
        return replica

    async def stand_by(self, snapshot: Snapshot, keep_seconds: float) -> float:
        """Image, weights and a standby; returns the seconds. Raises what `stage` does, RestoreFailed."""
        begin = time.monotonic()
        await self.stage(snapshot)
        await self.rungs.stand_by(snapshot, keep_seconds)
        return time.monotonic() - begin

    async def park(self, snapshot: Snapshot, keep_seconds: float, standby_seconds: float) -> float:
        """Image, weights and a parked replica; returns the seconds. Raises what `stage` and `Rungs.park` do."""
        begin = time.monotonic()
        self.rungs.check_parkable(snapshot)
        await self.stage(snapshot)
        await self.rungs.park(snapshot, keep_seconds, standby_seconds)
        return time.monotonic() - begin

    async def demote(self, replica_id: str, keep_seconds: float, rung: Rung = Rung.STANDBY, standby_seconds: float = 0.0) -> str:
        """Makes a replica the standby of its snapshot; where that cannot be, ends it and says why; one in a pod sleeps there. Raises what
        `Rungs.demote` does."""
        why = await self.rungs.demote(replica_id, rung, keep_seconds, standby_seconds)
        await self._give_room_back()
        return why

    async def wake(self, replica_id: str, activation: str) -> Replica:
        """One that sleeps in its pod serves again; one that is awake does. Raises what `Idling.wake` does."""
        phases = Phases()
        asked = self.replicas.get(replica_id)
        with self._makes_one(asked.snapshot):
            slept = asked in self.idling
            replica = await self.idling.wake(replica_id, phases)
        if slept:
            if replica.snapshot:
                self.staging.used(replica.snapshot)
            self.observer.restored(replica.model, replica.origin, replica.phases, replica.origin.value)
            self._log(activation, replica, phases)
        return replica

    @contextlib.contextmanager
    def _makes_one(self, snapshot: Snapshot | None) -> Iterator[None]:
        """Within it a replica is made, of a snapshot, or awake: nobody looks at GPUs, and what is only kept ready has time."""
        self._restoring += 1
        self.returning.give_way(snapshot.digest if snapshot else "")
        try:
            yield
        finally:
            self._restoring -= 1

    async def _give_way(self, lacking: Mapping[str, int]) -> bool:
        return await self.rungs.give_way(lacking)

    def _asleep(self) -> list[Snapshot]:
        return [each.snapshot for each in self.replicas if each.snapshot and each in self.idling]

    @property
    def _gpus_here(self) -> Sequence[str]:
        return self._cuda.gpus().uuids if self._cuda else ()

    @property
    def known_gpus(self) -> tuple[NodeGpu, ...]:
        """Of this node, in CUDA's order."""
        return self._cuda.known if self._cuda else ()

    async def release(self, replica_id: str) -> None:
        """Ends a replica and gives everything back. Raises NoReplica."""
        await self.replicas.release(replica_id)

    async def _give_room_back(self) -> None:
        if all(replica in self.idling for replica in self.replicas) and not self._restoring:
            await self.weights.return_room()

    async def capture(self, request: CaptureRequest, progress: Progress, phases: Phases, open_place: OpenPlace | None = None) -> Captured:
        """See Capturer.capture. Raises also CriuError where there is no CRIU."""
        if self._capturer is None:
            raise CriuError(self._why_no_criu)
        with capture_told(self.observer, request.model):
            captured = await self._capturer.capture(request, progress, phases, open_place)
        await self.standbys.drop_others(captured.snapshot)
        self._changed(captured.snapshot)
        return captured

    async def stage(self, snapshot: Snapshot, *, urgent: bool = False) -> float:
        """Image and weights into memory, at the same time; returns the seconds. `urgent`: a request waits for it. Raises what
        `Staging.hold` does, WeightsError."""
        begin = time.monotonic()
        try:
            try:
                await self._stage(snapshot, urgent=urgent)
            except NoMemory:
                if not await self.standbys.drop_oldest(but=snapshot.digest):
                    raise
                await self._stage(snapshot, urgent=urgent)
        except asyncio.CancelledError:
            self.staging.give_up(snapshot.digest)
            raise
        return time.monotonic() - begin

    def _stands_by(self, digest: str) -> bool:
        """Then its image stays: CRIU may read in it still, and whoever takes the standby from its rung finds what is below."""
        return digest in self.standbys

    def _is_used(self, digest: str) -> bool:
        """By something that lives: what it may need of its snapshot yet is on the disk."""
        return self._stands_by(digest) or any(
            each.snapshot is not None and each.snapshot.digest == digest for each in self.replicas if each.state is not State.GONE
        )

    async def _stage(self, snapshot: Snapshot, *, urgent: bool) -> None:
        with first_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(self.staging.stage(snapshot, urgent=urgent))
                group.create_task(self.returning.fill(snapshot, urgent=urgent))
        self.restorer.make_ready(snapshot)
        if snapshot.manifest.weights:
            await self.inventory.look_at_weights()

    async def remove(self, snapshot: Snapshot | Unreadable) -> None:
        """absent: off the disk, out of memory. Raises NotFound."""
        if isinstance(snapshot, Unreadable):
            await asyncio.to_thread(self.store.remove, snapshot.namespace, snapshot.name)
        else:
            await self.standbys.drop(snapshot.digest)
            await asyncio.to_thread(self.store.remove, snapshot.manifest.namespace, snapshot.manifest.name, snapshot.digest)
            # Last: whoever hears that it is out of memory may have it staged again at once, and must not find it any more.
            self.staging.unstage(snapshot.digest)
        self._changed(Removed(snapshot))

    async def check_named(self, snapshot: Snapshot) -> None:
        """After it was brought up, which takes a while. Where it was removed or replaced meanwhile, nothing of it stays there: whoever did
        found less of it. Raises NotFound.
        """
        if not self.store.stands(snapshot):
            await self.standbys.drop(snapshot.digest)
            self.staging.unstage(snapshot.digest)
            raise NotFound(f"snapshot {snapshot} was removed or replaced meanwhile")

    async def _yield_to_pressure(self) -> None:
        """Standbys are the first to go where memory runs short: they save time, and nothing needs them."""
        while True:
            await asyncio.sleep(_PRESSURE_SECONDS)
            if available_memory() < total_memory() // _PRESSURE_SHARE and await self.standbys.drop_oldest():
                _LOG.warning("memory runs short: the oldest standby was dropped")

    def _changed(self, change: Change) -> None:
        self.observer.replicas_are(sum(replica.state is not State.GONE for replica in self.replicas))
        self.observer.standbys_are({rung: sum(each.rung is rung for each in self.standbys) for rung in Rung}, self.rungs.held())
        self.observer.sleepers_are({rung: sum(each.rung is rung for each in self.idling) for rung in Rung})
        self.changes.tell(change)

    def _log(self, activation: str, replica: Replica, phases: Phases) -> None:
        parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in replica.phases)
        _LOG.info("activation %s: replica %s %s in %.3f s (%s)", activation or "-", replica.id, replica.origin.value, phases.total, parts)


def _sandboxes(store: Store, memory: Path, weights: Weights) -> Sandboxes:
    return Sandboxes(memory / _KDAT, layer.holder(store.state, memory)[0], weights.socket, store.state / "weights")


def _prepare(sandboxes: Sandboxes) -> None:
    """Removes what replicas of an agent that was killed have left, and says where those to come will write."""
    shutil.rmtree(sandboxes.layers, ignore_errors=True)
    if os.geteuid() == 0:
        sandboxes.checkpoints.mkdir(exist_ok=True)
        sandboxes.layers.mkdir(mode=0o700, exist_ok=True)
        for said in (layer.holder(sandboxes.checkpoints.parent, sandboxes.kdat.parent)[1], layer.unlayered()):
            if said:
                _LOG.warning("%s", said)
