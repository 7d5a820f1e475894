"""What an engine is of, and what it has beside its memory, at the moment of its dump."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from restore_agent.engine import renewal
from restore_agent.pages.images import process_ids
from restore_agent.places.place import Place
from restore_agent.places.processes import command_line, has_ended, resident_bytes
from restore_agent.snapshots.manifest import ProcessRecord


@dataclass(frozen=True)
class Dumped:
    """`carried`: files for the snapshot, by their names. `used`: files outside the image that the processes map or hold open."""

    moment: datetime.datetime
    carried: dict[str, bytes]
    used: set[Path]
    processes: tuple[ProcessRecord, ...]
    resident_bytes: int
    note: str  # of what each replica will have in common; empty: nothing

    @classmethod
    async def of(cls, place: Place, images: Path, gpu_holders: Collection[int]) -> Dumped:
        """Looked at while every task stands still: before that, some end and others begin. Of a child that has ended, and whose end its
        parent has not asked for, the image has the end alone: it is none of the processes.

        images: what CRIU has written. gpu_holders: pids on the host. Raises PlaceError, ImageError.
        """
        moment = datetime.datetime.now(datetime.UTC)
        carried = await place.carried(images)
        hosts = place.host_pids()
        inside = {pid: hosts[pid] for pid in sorted(process_ids(images)) if not has_ended(hosts[pid])}
        renews = await asyncio.to_thread(renewal.announced, place.control_directory, inside.keys())
        if renews:
            carried[renewal.RENEWAL_FILE] = renewal.encode(renews)
        used = await asyncio.to_thread(place.mapped_files, inside.values())
        processes = tuple(ProcessRecord(pid=pid, command=command_line(host), gpu=host in gpu_holders) for pid, host in inside.items())
        note = await asyncio.to_thread(renewal.note, inside, renews, place.is_ours)
        return cls(moment, carried, used, processes, sum(map(resident_bytes, inside.values())), note)
