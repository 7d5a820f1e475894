"""Where the node's weights stand, as gpumem said last: looked at every few seconds, so that nobody waits for an answer to know it."""

from __future__ import annotations

import enum
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.client.control import Control
from gpumem.wire.errors import GpumemError
from restore_agent.snapshots.manifest import WeightsRecord

_LOG = logging.getLogger("zerowake.agent")


class WeightsRung(enum.IntEnum):
    """MEMORY: gpumem's arena. GPU: memory that it lends, a GPU's or the host's."""

    ABSENT = 1
    DISK = 2
    MEMORY = 3
    GPU = 4


@dataclass(frozen=True, slots=True)
class _Seen:
    """rungs: of each region that gpumem has whole, by its namespace and its id in hex. free: bytes that it could give up, by device.

    held: bytes that it has of each device, lent or not; None: it does not say. status: all that it said; None: it does not, or is away.
    """

    rungs: Mapping[tuple[str, str], WeightsRung] = field(default_factory=dict)
    free: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] | None = field(default_factory=dict)
    status: pb.Status | None = None


class WeightsView:
    """What one gpumem holds. Without one, all weights are on disk."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._seen = _Seen()

    def rung(self, records: Iterable[WeightsRecord], tenant: str = "") -> WeightsRung:
        """The lowest of these regions, the namespace's or the operator's; ABSENT: there are none."""
        return min((self._rung(record.region, tenant) for record in records), default=WeightsRung.ABSENT)

    def _rung(self, region: str, tenant: str) -> WeightsRung:
        return max(self._seen.rungs.get((namespace, region), WeightsRung.DISK) for namespace in ("", tenant))

    def free_bytes(self, device: str) -> int:
        """Of the device's memory, what gpumem holds and has not lent."""
        return self._seen.free.get(device, 0)

    def largest_room(self, named: Collection[str]) -> int | None:
        """Bytes of the largest weights that could come, into one device's pool or the arena, while none leave that are `named`: ids in hex.

        None: nothing is known of it.
        """
        if (status := self._seen.status) is None:
            return None
        room = {**self._seen.free, "": status.arena_bytes}
        for region in status.regions:
            if not region.device:
                room[""] -= region.filled_bytes if region.id.hex() in named or region.pinned else 0
            elif region.id.hex() not in named and not (region.leases or region.pinned):
                room[region.device] += region.size
        return max(room.values())

    def held_bytes(self, device: str) -> int | None:
        """Of the device's memory, all that gpumem holds; None: it does not say."""
        return None if self._seen.held is None else self._seen.held.get(device, 0)

    @property
    def status(self) -> pb.Status | None:
        """What it said last; None: it does not say, or there is none."""
        return self._seen.status

    @property
    def is_silent(self) -> bool:
        """There is one, and it does not say what it holds."""
        return self._seen.held is None

    async def look(self) -> set[str]:
        """Asks gpumem; returns the regions that stand elsewhere than before."""
        before, self._seen = self._seen, await self._ask()
        regions = before.rungs.keys() | self._seen.rungs.keys()
        return {key[1] for key in regions if before.rungs.get(key) != self._seen.rungs.get(key)}

    async def _ask(self) -> _Seen:
        if not self._socket.exists():
            return _Seen()
        try:
            async with Control.connected(self._socket, "restore agent") as control:
                status = await control.status()
        except (GpumemError, OSError) as error:
            _LOG.debug("gpumem does not say what it holds: %s", error)
            return _Seen(held=None)
        rungs: dict[tuple[str, str], WeightsRung] = {}
        for region in status.regions:
            if region.sealed:
                rung = WeightsRung.GPU if region.device else WeightsRung.MEMORY
                key = region.namespace, region.id.hex()
                rungs[key] = max(rung, rungs.get(key, rung))
        return _Seen(
            rungs,
            {device.identity: device.free_bytes for device in status.devices},
            {device.identity: device.free_bytes + device.regions_bytes + device.scratch_bytes for device in status.devices},
            status,
        )
