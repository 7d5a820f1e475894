"""The second ladder: weights, which gpumem owns. absent → disk → gpumem's arena → lent memory (a GPU's pool, or the host's).

A snapshot names its weights as a region: a layout (kept in the snapshot) and the files that its chunks lie in. Staging has gpumem fill the
region ahead of need, or its arena where the pool has no room; a restore fills what is missing beside CRIU's work. gpumem verifies every
chunk on the way. The engine attaches by itself and its connection is its lease, so releasing a replica gives it back.

Engines on the machine are the operator's, and so are their regions. Those in pods have regions of their own namespace, which the agent
fills over that namespace's socket: no tenant has a mapping of another's weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.checkpoint.safetensors import InvalidCheckpoint, read_checkpoint
from gpumem.client.control import Control
from gpumem.server.regions import identify
from gpumem.wire.errors import Forbidden, GpumemError, NotFound, OutOfMemory
from gpumem.wire.sources import Source
from restore_agent.drivers.weights_fills import WeightsFills
from restore_agent.drivers.weights_view import WeightsRung, WeightsView
from restore_agent.errors import AgentError
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.manifest import Manifest, PartRecord, WeightsRecord, WeightsRegion
from restore_agent.transfer.progress import Progress
from zerowake_shared.background import to_its_end

DEFAULT_SOCKET = Path("/run/gpumem/gpumem.sock")
_STOP_SECONDS, _STOP_PROBE = 5.0, 0.05  # until a fill that is stopped has ended: it ends what it is moving
_LOG = logging.getLogger("zerowake.agent")


class WeightsError(AgentError):
    """gpumem cannot bring the weights; says what it said."""

    reason = "weights-failed"


class Weights:
    """gpumem, as snapshots need it: one connection a call."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.view = WeightsView(socket)
        self.rates = {WeightsRung.DISK: 0.0, WeightsRung.MEMORY: 0.0}  # bytes a second of the last fill from there; 0: none yet
        self._staged: Callable[[int, float], None] = lambda size, seconds: None
        self._fills = WeightsFills()
        self._borrowed: dict[str, int] = {}  # UUID → bytes that gpumem was asked to hold less of

    def on_stage(self, staged: Callable[[int, float], None]) -> None:
        """`staged` hears of the bytes of each region that was not in lent memory, and the seconds in which it came there."""
        self._staged = staged

    def environment(self, record: WeightsRecord, device: str) -> dict[str, str]:
        """What an engine needs to attach."""
        env = {"GPUMEM_SOCKET": str(self.socket), "GPUMEM_REGION": record.region}
        return env | ({"GPUMEM_DEVICE": device} if device else {})

    async def read(self, directory: Path) -> WeightsRegion:
        """A checkpoint directory as a region. Raises WeightsError."""
        try:
            found = await asyncio.to_thread(read_checkpoint, directory)
        except (InvalidCheckpoint, OSError) as error:
            raise WeightsError(f"weights in {directory}: {error}") from error
        layout = found.layout.SerializeToString(deterministic=True)
        folder = await asyncio.to_thread(_folder, directory)
        parts = tuple(
            PartRecord(path=part.path.name, offset=part.offset, first_chunk=part.first_chunk, chunks=part.chunks) for part in found.parts
        )
        record = WeightsRecord(region=identify(layout).hex(), size=found.layout.size, parts=parts, folder=str(folder))
        return WeightsRegion(record, layout, folder)

    async def fill(self, region: WeightsRegion, device: str = "", tenant: str = "", of: Snapshot | None = None) -> float:
        """Until the region is sealed in lent memory, of the device or of the only one. Returns the seconds it took. Raises WeightsError.

        tenant: the namespace whose region it is to be; empty: the operator's. of: the snapshot whose way up it is; None: of none yet.
        """
        begin, source = time.monotonic(), self.view.rung([region.record], tenant)
        async with self._control(region.record, tenant) as control:
            await self._bring(control, region, _sources(region), device or _only_device(control, region.record), False, of)
        seconds = time.monotonic() - begin
        if seconds > 0.1:  # it was not there already
            self.rates[WeightsRung.MEMORY if source is WeightsRung.MEMORY else WeightsRung.DISK] = region.record.size / seconds
        return seconds

    async def stage(
        self,
        region: WeightsRegion,
        devices: Sequence[str] = (),
        tenant: str = "",
        of: Snapshot | None = None,
        *,
        urgent: bool = False,
        spare: bool = False,
    ) -> bool:
        """Into lent memory of the first of the devices that has room, or into the arena. No device: the only one. Raises WeightsError.

        Room that nobody has comes first, wherever it is, and then what others' weights leave. urgent: a request waits, so that the arena
        comes last. spare: nobody's weights leave; False: there was no such room. tenant, of: as `fill` has them.
        """
        sources = _sources(region)
        begin, is_there = time.monotonic(), self.view.rung([region.record], tenant) is WeightsRung.GPU
        async with self._control(region.record, tenant) as control:
            lent = devices or [_only_device(control, region.record)]
            ways = [(device, True) for device in lent]
            if spare or not urgent:
                ways.append(("", True))
            if not spare:
                ways += [(device, False) for device in lent]
            for device, only_spare in ways:
                with contextlib.suppress(OutOfMemory):
                    await self._bring(control, region, sources, device, only_spare, of)
                    if device and not is_there:
                        self._staged(region.record.size, time.monotonic() - begin)
                    return True
            if not spare:
                await self._bring(control, region, sources, "", False, of)
        return not spare

    async def _bring(
        self, control: Control, region: WeightsRegion, sources: Sequence[Source], device: str, spare: bool, of: Snapshot | None
    ) -> None:
        """`device`: empty: into the arena. `spare`: nobody's weights leave for it. Raises GpumemError."""
        async with self._fills.told(control, region.record, device, of):
            await control.fill(region.layout, sources, device, spare=spare)

    async def let_go(self, records: Sequence[WeightsRecord], tenant: str = "") -> None:
        """Has them leave lent memory and the arena, but for what is in use or pinned. Raises WeightsError. tenant: as `fill` has it."""
        wanted, deadline = {record.region for record in records}, time.monotonic() + _STOP_SECONDS
        async with self._control(records[0], tenant) as control:
            while left := [
                each
                for each in (await control.status()).regions
                if each.id.hex() in wanted and each.namespace == tenant and not each.pinned and not each.leases
            ]:
                for region in left:
                    with contextlib.suppress(Forbidden, NotFound):  # a fill of it stops, or it has gone
                        await control.evict(pb.RegionRef(device=region.device, id=region.id))
                if time.monotonic() > deadline:
                    return
                await asyncio.sleep(_STOP_PROBE)

    def on_their_way(self) -> list[tuple[Snapshot, WeightsRung, Progress]]:
        """Whose weights come up now, to which rung, and how far they are."""
        return self._fills.now()

    async def resident(self, manifest: Manifest) -> dict[str, set[str]]:
        """Devices that hold all that was lent on one GPU, by that GPU (`WeightsRecord.gpu`). Raises WeightsError."""
        if not manifest.weights:
            return {}
        async with self._control(manifest.weights[0]) as control:
            regions = [region for region in (await control.status()).regions if region.namespace in ("", manifest.tenant)]
            sealed = {(region.device, region.id.hex()) for region in regions if region.sealed}
        found: dict[str, set[str]] = {}
        for record in manifest.weights:
            there = {device for device, region in sealed if region == record.region}
            found[record.gpu] = found.get(record.gpu, there) & there
        return found

    async def make_room(self, lacking: Mapping[str, int]) -> bool:
        """Has gpumem hold less, by what is free in its pool, until one of these GPUs has that many bytes more. False: none can.

        What was so taken is given back by `return_room`.
        """
        try:
            async with Control.connected(self.socket, "restore agent") as control:
                pools = {device.identity: device for device in (await control.status()).devices}
                for device, size in sorted(lacking.items(), key=lambda each: each[1]):
                    if device in pools and pools[device].free_bytes >= size:
                        before = pools[device].wanted_bytes
                        await to_its_end(self._reserve(control, device, before, before - size))
                        return True
        except (GpumemError, OSError) as error:
            _LOG.debug("no room was made: %s", error)  # there may be no gpumem at all
        return False

    async def return_room(self) -> None:
        """Has gpumem hold again what `make_room` took. Call it when no replica is left; what cannot be held yet, the next call returns."""
        borrowed = {device: size for device, size in self._borrowed.items() if size > 0}
        if not borrowed:
            return
        try:
            async with Control.connected(self.socket, "restore agent") as control:
                pools = {device.identity: device for device in (await control.status()).devices}
                for device, size in borrowed.items():
                    if device in pools:
                        before = pools[device].wanted_bytes
                        await to_its_end(self._reserve(control, device, before, before + size))
        except (GpumemError, OSError) as error:
            _LOG.warning("gpumem holds %d bytes less than it was started with: %s", sum(borrowed.values()), error)

    async def _reserve(self, control: Control, device: str, before: int, wanted: int) -> None:
        """It keeps its floor free as well, so a pool may have become smaller than was asked for, or not as large again."""
        await control.reserve(device, wanted)
        now = next(each.wanted_bytes for each in (await control.status()).devices if each.identity == device)
        self._borrowed[device] = self._borrowed.get(device, 0) + before - now

    @contextlib.asynccontextmanager
    async def _control(self, record: WeightsRecord, tenant: str = "") -> AsyncIterator[Control]:
        try:
            async with contextlib.AsyncExitStack() as stack:
                control = await stack.enter_async_context(Control.connected(self.socket, "restore agent"))
                if tenant:
                    path = Path(await control.tenant(tenant))
                    control = await stack.enter_async_context(Control.connected(path, "restore agent"))
                yield control
        except FileNotFoundError as error:
            raise WeightsError(
                f"weights {record.region[:12]}: {error.filename} is not on this node; bring the model there, or take the snapshot again"
            ) from error
        except (GpumemError, OSError) as error:
            raise WeightsError(f"weights {record.region[:12]}: {error}") from error


def _folder(directory: Path) -> Path:
    """Of a checkpoint's files, also where one of them was named alone."""
    return (directory.parent if directory.is_file() else directory).absolute()


def _sources(region: WeightsRegion) -> list[Source]:
    return [Source(region.folder / part.path, part.offset, part.first_chunk, part.chunks) for part in region.record.parts]


def _only_device(control: Control, record: WeightsRecord) -> str:
    identities = [device.identity for device in control.welcome.devices]
    if len(identities) != 1:
        raise WeightsError(f"weights {record.region[:12]}: gpumem holds memory of {len(identities)} devices, and one is needed here")
    return str(identities[0])
