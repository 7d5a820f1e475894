"""How far weights are that gpumem brings for a snapshot, as it says itself: it is asked over the connection that waits for the fill.

A fill that takes less than a quarter of a second is not looked at: a restore of weights that are there already costs no question.
Several regions that go to the same rung for one snapshot, as those of several GPUs do, are one way: the bytes of one that has come count
until the last has. Rejected: a word from gpumem at each move, which would have to be counted for whoever does not listen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace

from gpumem.client.control import Control
from gpumem.wire.errors import GpumemError
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.manifest import WeightsRecord
from restore_agent.transfer.progress import Progress
from zerowake_shared.background import ended

_LOOK_SECONDS = 0.25


@dataclass(slots=True)
class _Way:
    """Of one snapshot to one rung. fills: that are not answered yet; regions: how far each is, by its id and device."""

    snapshot: Snapshot
    rung: WeightsRung
    fills: int = 0
    regions: dict[tuple[str, str], Progress] = field(default_factory=dict)


class WeightsFills:
    """Of one gpumem."""

    def __init__(self) -> None:
        self._ways: dict[tuple[str, WeightsRung], _Way] = {}

    def now(self) -> list[tuple[Snapshot, WeightsRung, Progress]]:
        """What is on its way; of a fill that has just begun nothing is known yet."""
        return [(way.snapshot, way.rung, _sum(way.regions.values())) for way in self._ways.values() if way.regions]

    @contextlib.asynccontextmanager
    async def told(self, control: Control, record: WeightsRecord, device: str, of: Snapshot | None) -> AsyncIterator[None]:
        """While the block waits for the region's fill on the device (empty: into the arena), by that connection. of: None: nobody's."""
        if of is None:
            yield
            return
        rung = WeightsRung.GPU if device else WeightsRung.MEMORY
        way = self._ways.setdefault((of.digest, rung), _Way(of, rung))
        way.fills += 1
        watching = asyncio.create_task(_watch(control, way, record.region, device), name=f"weights of {of.digest[:12]}")
        try:
            yield
        finally:
            await ended([watching])
            if so_far := way.regions.get((record.region, device)):
                way.regions[record.region, device] = replace(so_far, done=so_far.total)
            way.fills -= 1
            if not way.fills:
                del self._ways[of.digest, rung]


async def _watch(control: Control, way: _Way, region: str, device: str) -> None:
    """Until it is cancelled, or gpumem says nothing more: then the fill's own answer says why."""
    before: int | None = None  # bytes that were there when it was looked at first
    with contextlib.suppress(GpumemError, OSError):
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for fill in (await control.status()).fills:
                if (fill.region.hex(), fill.device) == (region, device):
                    before = fill.filled_bytes if before is None else before
                    way.regions[region, device] = Progress(fill.filled_bytes, fill.filled_bytes - before, fill.size)


def _sum(regions: Iterable[Progress]) -> Progress:
    found = list(regions)
    return Progress(sum(each.done for each in found), sum(each.moved for each in found), sum(each.total for each in found))
