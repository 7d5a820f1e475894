"""The second ladder: weights, which gpumem owns. absent → disk → gpumem's arena → lent memory (a GPU's pool, or the host's).

A snapshot names its weights as a region: a layout (kept in the snapshot) and the files that its chunks lie in. Staging has gpumem fill the
region ahead of need, or its arena where the pool has no room; a restore fills what is missing beside CRIU's work. gpumem verifies every
chunk on the way. The engine attaches by itself and its connection is its lease, so releasing a replica gives it back.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from gpumem.control import Control
from gpumem.errors import GpumemError, OutOfMemory
from gpumem.regions import identify
from gpumem.safetensors import InvalidCheckpoint, read_checkpoint
from restore_agent.manifest import Manifest, PartRecord, WeightsRecord

DEFAULT_SOCKET = Path("/run/gpumem/gpumem.sock")


class WeightsError(Exception):
    """gpumem cannot bring the weights; says what it said."""


def layout_file(record: WeightsRecord) -> str:
    """Where a snapshot keeps the layout."""
    return f"weights/{record.region}.layout"


class Weights:
    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.rate = 0.0  # bytes a second of the last fill of lent memory; 0: none yet

    def environment(self, record: WeightsRecord) -> dict[str, str]:
        """What an engine needs to attach."""
        return {"GPUMEM_SOCKET": str(self.socket), "GPUMEM_REGION": record.region}

    async def read(self, directory: Path) -> tuple[WeightsRecord, bytes]:
        """A checkpoint directory as a region, and its layout. Raises WeightsError."""
        try:
            found = await asyncio.to_thread(read_checkpoint, directory)
        except (InvalidCheckpoint, OSError) as error:
            raise WeightsError(f"weights in {directory}: {error}") from error
        layout = found.layout.SerializeToString(deterministic=True)
        parts = tuple(
            PartRecord(path=str(part.path.resolve()), offset=part.offset, first_chunk=part.first_chunk, chunks=part.chunks)
            for part in found.parts
        )
        return WeightsRecord(region=identify(layout).hex(), size=found.layout.size, parts=parts), layout

    async def fill(self, record: WeightsRecord, layout: bytes) -> float:
        """Until the region is sealed in lent memory. Returns the seconds it took. Raises WeightsError."""
        begin = time.monotonic()
        try:
            async with Control.connected(self.socket, "restore agent") as control:
                await control.fill(layout, _sources(record), _device(control, record))
        except (GpumemError, OSError) as error:
            raise WeightsError(f"weights {record.region[:12]}: {error}") from error
        seconds = time.monotonic() - begin
        if seconds > 0.1:  # it was not there already
            self.rate = record.size / seconds
        return seconds

    async def stage(self, record: WeightsRecord, layout: bytes) -> None:
        """Into lent memory if there is room, else into the arena. Raises WeightsError."""
        try:
            async with Control.connected(self.socket, "restore agent") as control:
                try:
                    await control.fill(layout, _sources(record), _device(control, record))
                except OutOfMemory:
                    await control.fill(layout, _sources(record), "")
        except (GpumemError, OSError) as error:
            raise WeightsError(f"weights {record.region[:12]}: {error}") from error


async def fill_all(weights: Weights, manifest: Manifest, snapshot: Path) -> float:
    """Every region of a staged snapshot, into lent memory. Returns the seconds. Raises WeightsError."""
    begin = time.monotonic()
    for record in manifest.weights:
        await weights.fill(record, await asyncio.to_thread((snapshot / layout_file(record)).read_bytes))
    return time.monotonic() - begin


def _sources(record: WeightsRecord) -> list[tuple[Path, int, int, int]]:
    return [(Path(part.path), part.offset, part.first_chunk, part.chunks) for part in record.parts]


def _device(control: Control, record: WeightsRecord) -> str:
    identities = [device.identity for device in control.welcome.devices]
    if len(identities) != 1:
        raise WeightsError(f"weights {record.region[:12]}: gpumem holds memory of {len(identities)} devices, and one is needed here")
    return str(identities[0])
