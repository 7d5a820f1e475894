"""Where the node's weights stand, as gpumem said last: looked at every few seconds, so that nobody waits for an answer to know it."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.client.control import Control
from gpumem.wire.errors import GpumemError
from restore_agent.snapshots.manifest import WeightsRecord

_GRANULE = 2 << 20  # bytes; what gpumem lends at least, of any device

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

    def places(self, wanted: Mapping[str, tuple[int, Sequence[str]]]) -> dict[str, str] | None:
        """Where regions find room that nobody has: on the first such device, else in the arena (empty). None: not all of them do.

        wanted: by region, its bytes, and the devices that it may come to; none: the only one.
        """
        if self._seen.status is None or (free := self._room()) is None:
            return None
        begun = {(region.id.hex(), region.device) for region in self._seen.status.regions if not region.sealed}
        found: dict[str, str] = {}
        for region, (size, devices) in wanted.items():
            takes = -(-size // _GRANULE) * _GRANULE
            needs = {device: 0 if (region, device) in begun else takes for device in (*(devices or self._seen.free), "")}
            able = [device for device, needed in needs.items() if free.get(device, 0) >= needed]
            if not able:
                return None
            found[region] = able[0]
            free[able[0]] -= needs[able[0]]
        return found

    @property
    def largest_room(self) -> int | None:
        """Bytes of the largest region that would find such room; None: nothing is known of it."""
        return max(room.values()) if (room := self._room()) else None

    def _room(self) -> dict[str, int] | None:
        """Bytes that no weights have, by device, and (empty) of the arena."""
        if (status := self._seen.status) is None:
            return None
        return {**self._seen.free, "": status.arena_bytes - sum(region.size for region in status.regions if not region.device)}

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
