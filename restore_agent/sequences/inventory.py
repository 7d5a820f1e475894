"""What is on a node, as it was seen last: its snapshots on the disk, where their weights stand, and its GPUs.

All of it changes without a word to the agent: a disk loses files, others write below the state folder, gpumem evicts, is started and is
stopped, and programs that are not ours take memory of the GPUs. So it is looked at again and again, and whoever wants to know how it
stands is told what was seen last, and waits for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from restore_agent.drivers.cuda import Cuda
from restore_agent.drivers.weights import Weights
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.sequences.changes import Change
from restore_agent.sequences.staging import Staging
from restore_agent.sequences.travel import Travel
from restore_agent.snapshots.catalog import Snapshot, Unreadable
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.damage import DamageWatch
from restore_agent.snapshots.store import Store
from restore_agent.transfer.progress import Progress
from zerowake_shared.background import kept

_WEIGHTS_SECONDS = 2.0  # between two looks at where weights stand
_GPUS_SECONDS = 0.5  # the same at what is free on GPUs: who loses one to others plans anew
_UNFIT_SECONDS = 10.0  # between two looks at what did not fit this node
_STORE_SECONDS = 2.0  # between two looks at what was published, or so many times what a look took: a node may have thousands
_STORE_REST = 30.0
_LOG = logging.getLogger("zerowake.agent")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of the node. free_bytes: free now, with what gpumem would give up of its pool, and parked engines would give back.

    unused_bytes: that nobody has. pool_bytes: that gpumem has, lent or not; None: it does not say. parked_bytes: that parked engines have.
    """

    uuid: str
    model: str
    total_bytes: int
    free_bytes: int
    unused_bytes: int
    pool_bytes: int | None
    parked_bytes: int

    @property
    def others_bytes(self) -> int | None:
        """That all others have: engines that run, and whatever else there is. None: not known."""
        if self.pool_bytes is None:
            return None
        return max(0, self.total_bytes - self.unused_bytes - self.pool_bytes - self.parked_bytes)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A part of a snapshot on its way. digest: empty: not known yet. to_memory: its image, from the disk. weights: they are, to that rung.
    Neither: all of it, onto the disk.
    """

    namespace: str
    name: str
    digest: str
    to_memory: bool = False
    weights: WeightsRung | None = None


class Inventory:
    """Of one node. Use `async with inventory.watched()`."""

    def __init__(
        self,
        store: Store,
        staging: Staging,
        travel: Travel,
        weights: Weights,
        cuda: Cuda | None,
        parked: Callable[[], Mapping[str, int]],
        is_restoring: Callable[[], bool],
        changed: Callable[[Change], None],
    ) -> None:
        """`parked`: bytes of each GPU that parked engines hold. `changed` hears of each snapshot that is not what it was."""
        self._store = store
        self._staging = staging
        self._travel = travel
        self._weights = weights
        self._view = weights.view
        self._named: set[str] = set()  # regions that snapshots here had when weights moved last
        self._cuda = cuda
        self._parked = parked
        self._is_restoring = is_restoring
        self._changed = changed
        self.gpus: list[Gpu] = []  # that snapshots can be restored to
        self.snapshots: dict[str, int] = {}  # how many names stand for what, as DamageWatch.counts has it; empty: not looked at yet

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Looks at everything again and again until the block ends."""
        await self.look_at_gpus()
        watching = [
            asyncio.create_task(kept(self._watch_store, "snapshots on disk", _LOG), name="snapshots on disk"),
            asyncio.create_task(kept(self._watch_weights, "weights", _LOG), name="weights"),
            asyncio.create_task(kept(self._watch_gpus, "GPUs", _LOG), name="GPUs"),
        ]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()

    def transfers(self) -> dict[Transfer, Progress]:
        """All that is on its way up now."""
        found = {Transfer(namespace, name, digest): progress for (namespace, name), (digest, progress) in self._travel.arriving.items()}
        for snapshot, progress in self._staging.on_their_way():
            manifest = snapshot.manifest
            found[Transfer(manifest.namespace, manifest.name, snapshot.digest, to_memory=True)] = progress
        for snapshot, rung, progress in self._weights.on_their_way():
            manifest = snapshot.manifest
            found[Transfer(manifest.namespace, manifest.name, snapshot.digest, weights=rung)] = progress
        return found

    async def look_at_weights(self) -> None:
        if moved := await self._view.look():
            here = [each for each in await asyncio.to_thread(self._store.list) if isinstance(each, Snapshot)]
            self._named = {record.region for each in here for record in each.manifest.weights}
            for snapshot in here:
                if any(record.region in moved for record in snapshot.manifest.weights):
                    self._changed(snapshot)

    @property
    def weights_room(self) -> int | None:
        """Bytes of the largest weights that could come up while none leave that a snapshot here has; None: not known."""
        return self._view.largest_room(self._named)

    async def look_at_gpus(self) -> None:
        """Not while something is restored: the driver answers late then, and it has better things to do."""
        if self._cuda is None or self._is_restoring():
            return
        free, total = await asyncio.to_thread(self._cuda.free), await asyncio.to_thread(self._cuda.total)
        parked, known = self._parked(), self._cuda.gpus()
        self.gpus = [
            Gpu(
                uuid=each,
                model=model,
                total_bytes=total[each],
                free_bytes=free[each] + self._view.free_bytes(each) + parked.get(each, 0),
                unused_bytes=free[each],
                pool_bytes=self._view.held_bytes(each),
                parked_bytes=parked.get(each, 0),
            )
            for each, model in zip(known.uuids, known.names, strict=True)
        ]

    async def _watch_weights(self) -> None:
        while True:
            await self.look_at_weights()
            await asyncio.sleep(_WEIGHTS_SECONDS)

    async def _watch_gpus(self) -> None:
        while True:
            await self.look_at_gpus()
            await asyncio.sleep(_GPUS_SECONDS)

    async def _watch_store(self) -> None:
        watch, looked = DamageWatch(self._store), 0.0
        while True:
            begin = time.monotonic()
            for found in await asyncio.to_thread(watch.look, dict(self._staging.damaged)):
                if isinstance(found, Unreadable):
                    _LOG.error("snapshot %s/%s cannot be used any more: %s", found.namespace, found.name, found.why)
                    self._changed(found)
                    continue
                if found.why:
                    _LOG.error("snapshot %s is damaged: %s", found.snapshot, found.why)
                    self._staging.damaged[found.snapshot.digest] = found.why
                else:
                    _LOG.info("snapshot %s is whole again", found.snapshot)
                    self._staging.damaged.pop(found.snapshot.digest, None)
                    self._staging.unusable.pop(found.snapshot.digest, None)
                self._changed(found.snapshot)
            self.snapshots = watch.counts()
            if self._staging.unusable and time.monotonic() > looked + _UNFIT_SECONDS:
                await self._look_at_unfit()
                looked = time.monotonic()
            if self._store.postponed:  # for a manifest that was torn, say, and may be whole again
                await asyncio.to_thread(self._store.sweep)
            await asyncio.sleep(max(_STORE_SECONDS, _STORE_REST * (time.monotonic() - begin)))

    async def _look_at_unfit(self) -> None:
        """What the node did not have for a snapshot may have come: a folder that was not mounted yet, a file that was put back."""
        for found in await asyncio.to_thread(self._store.list):
            if not isinstance(found, Snapshot) or found.digest not in self._staging.unusable or found.digest in self._staging.damaged:
                continue
            with contextlib.suppress(Incompatible, OSError):
                await asyncio.to_thread(self._staging.check_fits, found.manifest)
                self._staging.unusable.pop(found.digest, None)
                _LOG.info("snapshot %s fits this node now", found)
                self._changed(found)
