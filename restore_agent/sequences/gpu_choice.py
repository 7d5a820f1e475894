"""The GPUs of one wake: those that a pod was given, or else chosen among all that are there, with room made where it is short, and counted
as taken until it is done.

Where no GPU has the memory, gpumem gives up what it has not lent, and then parked engines what they hold. What a snapshot's ranks had each
on a GPU of its own follows them: their weights come to the GPU that takes that one's place.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from restore_agent.drivers.cuda import Cuda, CudaError
from restore_agent.drivers.weights import Weights
from restore_agent.sequences.placement import NoGpuMemory, choose_gpus, keep_order
from restore_agent.snapshots.manifest import Manifest, WeightsRecord

GiveWay = Callable[[Mapping[str, int]], Awaitable[bool]]  # by the bytes that GPUs lack; whether any has more now


@dataclass(frozen=True)
class Suspended:
    """What a suspended tree needs of GPUs, and which they were."""

    manifest: Manifest
    needed: Mapping[str, int]  # UUID of each that it used → bytes
    before: Sequence[str]  # UUIDs of all that the driver had
    places: Mapping[str, str]  # UUID of each GPU of the snapshot → of the one among these that was in its place
    given: Sequence[str] | None = None  # UUIDs of its place's own (`Place.gpus`); None: all of the node will do
    why_there: str = "which this pod was given"  # of `given`, in words

    def device(self, record: WeightsRecord, pairs: Mapping[str, str]) -> str:
        """Where weights belong: in the place of the GPU that they were lent on, or of the one that the processes use most; empty: none.

        pairs: each of `needed` → the one that it wakes on.
        """
        if not self.needed:
            return ""
        return pairs.get(self.places.get(record.gpu, ""), pairs[self._most])

    def resident(self, lent: Mapping[str, Collection[str]]) -> dict[str, Collection[str]]:
        """GPUs here that hold the weights of each that it used. `lent`: by the GPU of the snapshot that they were lent on."""
        return {self.places.get(gpu, "") or self._most: devices for gpu, devices in lent.items()}

    @property
    def _most(self) -> str:
        return max(self.needed, key=lambda each: self.needed[each])


class GpuChoice:
    """Chooses GPUs of one node."""

    def __init__(self, cuda: Cuda | None, weights: Weights, give_way: GiveWay) -> None:
        """`give_way`: asked where GPU memory is short and gpumem has none."""
        self._cuda = cuda
        self._weights = weights
        self._give_way = give_way

    @contextlib.asynccontextmanager
    async def chosen(self, tree: Suspended, barred: Collection[str] = (), *, give_way: bool = True) -> AsyncIterator[dict[str, str]]:
        """Each GPU of the suspend → one of this node, whose memory counts as taken until the block ends.

        Raises:
            NoGpuMemory, OtherLinks: nothing was begun.
            CudaError: there is no usable GPU.
            WeightsError: gpumem does not say where weights are.
        """
        if not tree.needed:
            yield {}
            return
        if self._cuda is None:
            raise CudaError("the snapshot holds GPU state and this node has no usable GPU")
        here, then = self._cuda.gpus(), tree.manifest.fits.gpus
        chooses = len(here.uuids) > 1 and tree.given is None
        resident = tree.resident(await self._weights.resident(tree.manifest)) if chooses else {}

        def link(one: str, other: str) -> str:
            return here.link(one, other) or (then.link(one, other) if then else "")

        pairs: dict[str, str] | None = None
        asked = 0
        while pairs is None:
            try:
                if tree.given is None:
                    pairs = choose_gpus(tree.needed, tree.before, here.uuids, self._cuda.free(), resident, barred, link)
                else:
                    pairs = keep_order(tree.needed, tree.before, tree.given, self._cuda.free(), barred, link, tree.why_there)
            except NoGpuMemory as error:
                if asked < len(tree.needed) and await self._weights.make_room(error.lacking):  # on each of them at most once
                    asked += 1
                elif give_way and await self._give_way(error.lacking):
                    asked = 0
                else:
                    raise
        with self._cuda.promised({pairs[old]: size for old, size in tree.needed.items()}):
            yield pairs


def staging_devices(manifest: Manifest, record: WeightsRecord, here: Sequence[str]) -> list[str]:
    """GPUs here that weights may be staged to, the most fitting first; none: those of no GPU.

    A rank's are of use on one GPU alone: the one that it had, or where that is not here, the one at its place in the driver's order.
    """
    if not manifest.gpus:
        return []
    then = manifest.fits.gpus.uuids if manifest.fits.gpus else ()
    if len(manifest.gpus) > 1 and record.gpu in then:
        return [record.gpu] if record.gpu in here else list(here[then.index(record.gpu) :][:1])
    return sorted(here, key=lambda each: manifest.gpus.get(each, 0), reverse=True)
