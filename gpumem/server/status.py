"""What a server holds, for people and for whoever plans with it: devices, regions, leases, and fills under way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.arena import Arena
from gpumem.server.device import Device
from gpumem.server.filling import Job
from gpumem.server.leases import Lease
from gpumem.server.regions import Region, State


def status_of(devices: Mapping[str, Device], arena: Arena, jobs: Iterable[Job], namespace: str | None) -> pb.Status:
    """All of it, or what a namespace may see. Fillers and connections are the server's to add.

    Raises:
        MemoryFailed: a device does not tell how much of it is free.
    """

    def seen(owner: str) -> bool:
        return namespace in (None, owner)

    status = pb.Status(arena_bytes=arena.size, arena_used_bytes=arena.used, arena_idle_bytes=arena.idle)
    for device in devices.values():
        status.devices.append(_device(device))
        status.regions.extend(_region(region) for region in device.regions.values() if seen(region.namespace))
        status.leases.extend(_lease(lease) for lease in device.leases if seen(lease.owner.namespace))
    status.regions.extend(_staged(arena, owner, region_id) for owner, region_id in arena.sets if seen(owner))
    status.fills.extend(_fill(job) for job in jobs if seen(job.owner.namespace))
    return status


def _device(device: Device) -> pb.DeviceStatus:
    free, total = device.memory.free()
    return pb.DeviceStatus(
        identity=device.identity,
        wanted_bytes=device.pool.wanted,
        free_bytes=device.pool.free,
        regions_bytes=sum(region.size for region in device.regions.values()),
        scratch_bytes=sum(lease.size for lease in device.scratch()),
        owed_bytes=device.pool.owed,
        device_free_bytes=free,
        device_total_bytes=total,
        slabs=device.pool.slabs + sum(len(region.slabs) for region in device.regions.values()),
    )


def _region(region: Region) -> pb.RegionStatus:
    return pb.RegionStatus(
        device=region.device,
        id=region.id,
        namespace=region.namespace,
        size=region.size,
        filled_bytes=region.filled_bytes,
        sealed=region.state is State.SEALED,
        pinned=region.pinned,
        leases=region.readers,
        idle_seconds=0.0 if region.readers else time.monotonic() - region.used,
    )


def _staged(arena: Arena, owner: str, region_id: bytes) -> pb.RegionStatus:
    """A set of chunks in the arena, as a region that is on no device."""
    chunks = arena.sets[owner, region_id]
    present = arena.present(chunks.keys)
    return pb.RegionStatus(
        id=region_id, namespace=owner, size=chunks.size, filled_bytes=present, sealed=present == chunks.size, pinned=chunks.pinned
    )


def _lease(lease: Lease) -> pb.LeaseStatus:
    return pb.LeaseStatus(
        namespace=lease.owner.namespace,
        label=lease.owner.label,
        pid=lease.owner.pid,
        device=lease.device,
        size=lease.size,
        region=lease.region.id if lease.region is not None else b"",
        writable=lease.writable,
        joined=lease.joined,
    )


def _fill(job: Job) -> pb.FillStatus:
    return pb.FillStatus(
        device=job.device.identity if job.device is not None else "",
        region=job.result.id,
        size=sum(job.chunks.sizes),
        filled_bytes=job.done_bytes,
        bytes_per_second=job.rate,
    )
