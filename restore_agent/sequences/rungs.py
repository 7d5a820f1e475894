"""The upper rungs of a node: replicas restored ahead, parked, demoted, and what gives way where GPU memory is wanted.

A parked engine holds memory of a GPU for nobody. So it is the first to go down to standby where a restore or a wake finds no GPU with
enough, once gpumem has given up what it has not lent: the one that was idle the longest first, and none where all of them together would
not be enough. Where a GPU is given to somebody else's pod, all of them go down. Rejected: parking an engine in the place of another one
that is parked, since whoever plans knows better which of the two is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from restore_agent.drivers.cuda import Cuda
from restore_agent.drivers.weights_view import WeightsView
from restore_agent.errors import FAILURES, AgentError
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.idling import Idling
from restore_agent.sequences.parked_budget import ParkedBudget, Share
from restore_agent.sequences.replicas import Replica, Replicas
from restore_agent.sequences.restore import Restorer
from restore_agent.sequences.standby import Rung, Standby, Standbys
from restore_agent.sequences.transitions import Transitions
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unusable import Unusable
from zerowake_shared.background import to_its_end

_LOG = logging.getLogger("zerowake.agent")


class CannotPark(AgentError):
    """An engine of this snapshot cannot be parked; it stays where it stands."""

    reason = "cannot-park"


class Rungs:
    """Moves what a node has restored between running, parked and standby."""

    def __init__(
        self,
        restorer: Restorer,
        transitions: Transitions,
        standbys: Standbys,
        replicas: Replicas,
        store: Store,
        cuda: Cuda | None,
        view: WeightsView,
        share: Share,
        idling: Idling,
    ) -> None:
        """`share`: of each GPU, for parked engines. `idling`: those that are kept in their pods."""
        self._restorer = restorer
        self._transitions = transitions
        self._standbys = standbys
        self._replicas = replicas
        self._store = store
        self._view = view
        self._idling = idling
        self._making: dict[str, asyncio.Lock] = {}
        self.budget = ParkedBudget(share, cuda.total if cuda else dict, self.held)

    def held(self) -> dict[str, int]:
        """UUID → bytes of each GPU that parked engines hold."""
        found: dict[str, int] = {}
        for standby in self._all():
            if standby.rung is Rung.PARKED:
                for gpu, size in standby.gpus.items():
                    found[gpu] = found.get(gpu, 0) + size
        return found

    def _all(self) -> list[Standby]:
        return [*self._standbys, *self._idling]

    def parked_bytes(self, snapshot: Snapshot) -> list[int]:
        """What a parked engine of it holds of each GPU that it uses, the most first. Empty: of none, or it cannot be parked."""
        standby = self._standbys.get(snapshot.digest)
        if standby and standby.rung is Rung.PARKED:
            return sorted(standby.gpus.values(), reverse=True)
        return sorted(snapshot.manifest.gpus.values(), reverse=True) if snapshot.manifest.quiesces else []

    async def stand_by(self, snapshot: Snapshot, keep_seconds: float) -> None:
        """Unless there is one, or one is parked. Raises RestoreFailed."""
        async with self._made(snapshot):
            if snapshot.digest not in self._standbys:
                self._standbys.add(await self._restorer.prepare(snapshot), keep_seconds)

    def check_parkable(self, snapshot: Snapshot) -> None:
        """Raises CannotPark, ParkedFull."""
        _check_quiesces(snapshot)
        standby = self._standbys.get(snapshot.digest)
        if standby is None or standby.rung is not Rung.PARKED:
            self.budget.check((standby.gpus if standby else snapshot.manifest.gpus).values())

    async def park(self, snapshot: Snapshot, keep_seconds: float, standby_seconds: float) -> None:
        """Its standby, which is made first where there is none. Raises CannotPark, ParkedFull, NoGpuMemory, RestoreFailed, CudaError."""
        self.check_parkable(snapshot)
        async with self._made(snapshot):
            is_parked = False
            while not is_parked:  # another may wake it meanwhile
                if (standby := self._standbys.get(snapshot.digest)) is None:
                    standby = await self._restorer.prepare(snapshot)
                    self._standbys.add(standby, standby_seconds)
                is_parked = await self._standbys.move(standby, Rung.PARKED, self._park(standby_seconds), keep_seconds)

    def _park(self, standby_seconds: float) -> Callable[[Standby], Awaitable[None]]:
        async def step(standby: Standby) -> None:
            self.budget.check(standby.gpus.values())
            await self._transitions.park(standby, self.budget)
            standby.standby_seconds = standby_seconds

        return step

    async def unpark(self, snapshot: Snapshot) -> None:
        """What is parked of it becomes a standby; without that, nothing. Raises RestoreFailed; then it is gone."""
        if standby := self._standbys.get(snapshot.digest):
            await self._unpark(standby)

    async def _unpark(self, standby: Standby) -> None:
        if standby.engine.place.is_ours:
            await self._standbys.move(standby, Rung.STANDBY, self._transitions.unpark, standby.standby_seconds)
        else:
            await self._idling.unpark(standby)

    async def demote(self, replica_id: str, rung: Rung, keep_seconds: float, standby_seconds: float) -> str:
        """Makes a replica that works on nothing the standby of its snapshot; where that cannot be, ends it and says why. One in a pod
        sleeps there, on that rung, until it is woken.

        Raises:
            NoReplica.
            CannotPark, ParkedFull: it was to be parked, and goes on.
            CannotSleep, StillUsed, RestoreFailed: what `Idling.sleep` does.
        """
        replica = self._replicas.get(replica_id)
        if not replica.engine.place.is_ours:
            await self._idling.sleep(replica, rung, self.budget)
            return ""
        snapshot = replica.snapshot
        if rung is Rung.PARKED:
            if snapshot is None:
                raise CannotPark(f"replica {replica_id} cannot be parked: it was started without a snapshot")
            _check_quiesces(snapshot)
            self.budget.check_there(replica.engine.gpu_bytes)
        # Held before anybody hears that the replica is gone: who then asks for a standby gets this one.
        async with self._made(snapshot) if snapshot else contextlib.nullcontext():
            replica = self._replicas.detach(replica_id)
            with self.budget.counted(replica.engine.gpu_bytes if rung is Rung.PARKED else {}):
                try:
                    why = await self._demote(replica, rung, keep_seconds, standby_seconds)
                except BaseException:  # nobody else knows it any more
                    await to_its_end(_ended(replica))
                    raise
        if why:
            await to_its_end(_ended(replica))
            _LOG.info("replica %s ended and is no standby: %s", replica.id, why)
        return why

    async def _demote(self, replica: Replica, rung: Rung, keep_seconds: float, standby_seconds: float) -> str:
        snapshot = replica.snapshot
        if snapshot is None:
            return "it was started without a snapshot"
        before = self._standbys.get(snapshot.digest)
        if before and (rung is Rung.STANDBY or before.rung is Rung.PARKED):
            return "its snapshot has a standby"
        try:
            manifest = snapshot.manifest
            await asyncio.to_thread(self._store.get, manifest.namespace, manifest.name, snapshot.digest)
            standby = await self._transitions.demote(replica.engine, snapshot, rung)
        except (RestoreFailed, NotFound, Unusable, OSError) as error:
            return str(error)
        standby.standby_seconds = standby_seconds
        await self._standbys.drop(snapshot.digest)  # of a lower rung
        self._standbys.add(standby, keep_seconds)
        return ""

    async def give_way(self, lacking: Mapping[str, int]) -> bool:
        """Makes the longest idle of those parked on one of these GPUs a standby, by the bytes that each lacks. False: that is no use."""
        held = self.held()
        enough = {gpu for gpu, size in lacking.items() if held.get(gpu) and held[gpu] + self._view.free_bytes(gpu) >= size}
        if there := self._parked_on(enough):
            await self._gives_way(min(there, key=lambda each: each.since), "another engine needs its GPU's memory")
        return bool(there)

    async def others_have(self, gpus: Collection[str]) -> None:
        """These GPUs, and no other, are somebody else's from now on: what is parked there becomes a standby, and nothing else comes."""
        self.budget.others_have(gpus)
        for standby in self._parked_on(gpus):
            await self._gives_way(standby, "its GPU is another pod's now")

    def _parked_on(self, gpus: Collection[str]) -> list[Standby]:
        return [each for each in self._all() if each.rung is Rung.PARKED and not each.gpus.keys().isdisjoint(gpus)]

    async def _gives_way(self, standby: Standby, why: str) -> None:
        """To standby; where that fails it is gone, and its memory is free, too."""
        try:
            await self._unpark(standby)
            _LOG.info("%s was parked for %.0f s and is a standby: %s", standby.snapshot, time.monotonic() - standby.since, why)
        except FAILURES as error:
            _LOG.warning("what was parked of %s is dropped, as it does not become a standby: %s", standby.snapshot, error)

    def _made(self, snapshot: Snapshot) -> asyncio.Lock:
        """Held by whoever makes a standby of it."""
        return self._making.setdefault(snapshot.digest, asyncio.Lock())


async def _ended(replica: Replica) -> None:
    """One that is in no list any more."""
    await replica.engine.place.close()
    replica.engine.output.close()


def _check_quiesces(snapshot: Snapshot) -> None:
    """Raises CannotPark."""
    if not snapshot.manifest.quiesces:
        raise CannotPark(
            f"an engine of snapshot {snapshot} cannot be parked: it does not take part in the control directory, so it cannot let go "
            "of what is lent to it and wait; keep it as a standby"
        )
