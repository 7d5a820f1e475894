"""Filling: a region, or the arena, from wherever the bytes are nearest: another device, the arena, the caller's files.

A fill is cut into moves of half a gigabyte, a few under way at a time. What a finished move brought is there for good: when the caller
goes away, or the filler dies, the region stays as it is, unsealed and without a reader, until somebody asks again or its memory is wanted.
A fill that is told to stop still waits for the moves that are under way, since the filler writes where they say until they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.arena import Arena, ChunkSet, Place
from gpumem.filler.foreman import FillerProcess, Foreman
from gpumem.server.device import Device
from gpumem.server.leases import Owner
from gpumem.server.regions import Chunks, Region, State, identify
from gpumem.wire.errors import Cancelled, FillerLost, Invalid, NotFound, OutOfMemory, WrongDevice
from gpumem.wire.frames import close_all

MOVE = 512 << 20  # bytes at most of one order to the filler
PEER_MOVE = 4 << 30  # the same between GPUs: over NVLink, 512 MiB are copied faster than they are planned and reported
_UNDER_WAY = 3  # moves of one fill at a time, so that some read while others copy
_TRIES = 3  # fillers that may die under one fill before it fails, as long as none of them moves anything

logger = logging.getLogger(__name__)
_numbers = itertools.count(1)


@dataclass(eq=False)
class Job:
    """One fill that is under way."""

    chunks: Chunks
    owner: Owner
    sources: Mapping[int, tuple[int, int]]  # chunk -> (file, offset)
    files: list[int]  # descriptors; closed by the job
    device: Device | None  # None: into the arena only
    region: Region | None
    result: pb.Filled
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False
    waiting: bool = False  # for room in the arena, which another fill is to make
    done: set[int] = field(default_factory=set)  # chunks that are there, by index
    spare: bool = False  # nobody's bytes leave for it
    kept: frozenset[bytes] = frozenset()  # hashes of chunks that do not leave the arena for it
    held: list[Place] = field(default_factory=list)  # what a fill into the arena only has brought; kept there until it ends

    @property
    def done_bytes(self) -> int:
        return sum(self.chunks.sizes[index] for index in self.done)

    @property
    def rate(self) -> float:
        """Bytes a second, of what this fill brought itself."""
        return (self.done_bytes - self.result.there_before) / max(1e-9, time.monotonic() - self.started)


@dataclass
class Planned:
    """One move, as an order for the filler and as what to write down when it is done."""

    steps: list[pb.Step] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    places: list[tuple[Place, bytes]] = field(default_factory=list)  # retained; with the hash of a chunk that this move loads, else b""
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("from_arena", "from_files", "from_device"), 0))

    def add(self, index: int, step: pb.Step, origin: str) -> None:
        self.chunks.append(index)
        self.bytes[origin] += step.size
        last = self.steps[-1] if self.steps else step
        if origin == "from_device" and last.source_offset + last.size == step.source_offset:
            last.size += step.size  # over NVLink a chunk is copied faster than it is asked for
        else:
            self.steps.append(step)


class Filling:
    """All fills of a server: plans their moves, and has the fillers carry them out."""

    def __init__(self, devices: Mapping[str, Device], foremen: Mapping[str, Foreman], arena: Arena) -> None:
        self._devices = devices
        self._foremen = foremen
        self._arena = arena
        self._room = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.jobs: set[Job] = set()

    async def fill(self, request: pb.Fill, files: list[int], owner: Owner) -> pb.Filled:
        """Answers when the region is sealed. `files` are closed in any case. Cancelled, it stops the fill after the moves under way.

        Raises:
            Invalid, WrongDevice, OutOfMemory, NotFound, Corrupt, FillerLost, GpumemError.
        """
        job = None
        try:
            chunks = Chunks.parse(request.layout)
            if not chunks.sizes:
                raise Invalid("layout.chunks: empty, so there is nothing to fill it with: begin the region and write it")
            sources = _check_sources(request.sources, files, chunks)
            result = pb.Filled(id=identify(request.layout))
            device = self._devices.get(request.device)
            if request.device and device is None:
                raise WrongDevice(f"no device {request.device!r} here; there are {', '.join(self._devices)}")
            region = None
            if device is not None:
                region = await self._claim(device, request, chunks, owner, result)
                if region is None:
                    return result
            kept = self._kept(request.spare, device, chunks, owner)
            job = Job(chunks, owner, sources, files, device, region, result, spare=request.spare, kept=kept)
            if region is not None:
                job.done = region.filled
            result.there_before = job.done_bytes
            self.jobs.add(job)
        finally:
            if job is None:
                close_all(files)
        work = self._spawn(self._work(job, request.pinned))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            job.stopped = True
            raise
        result.seconds = time.monotonic() - job.started
        return result

    async def close(self) -> None:
        """Ends every fill; for when no filler is left."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _kept(self, spare: bool, device: Device | None, chunks: Chunks, owner: Owner) -> frozenset[bytes]:
        """What of the arena stays for a fill: as little as may be, or (spare) all that anybody wanted there. Raises OutOfMemory."""
        if not spare:
            return frozenset()
        kept = self._arena.wanted()
        if device is None:
            lacking = sum(chunks.sizes) - self._arena.present((owner.namespace, chunk) for chunk in chunks.hashes)
            if lacking > (free := self._arena.spare(kept)):
                raise OutOfMemory(f"{lacking} bytes are to come into the arena of {self._arena.size} bytes, of which nobody has {free}")
        return kept

    async def _claim(self, device: Device, request: pb.Fill, chunks: Chunks, owner: Owner, result: pb.Filled) -> Region | None:
        """The region to fill, claimed for this fill (FILLING, so that no other begins); None if it is sealed already."""
        await device.while_busy(owner.namespace, result.id)
        region = device.regions.get((owner.namespace, result.id))
        public = device.regions.get(("", result.id))
        if region is None and public is not None and public.state is State.SEALED and not public.private:
            region = public
        if region is None:
            private = bool(owner.namespace)
            region = await device.create(
                result.id, request.layout, chunks, owner, private=private, pinned=request.pinned, spare=request.spare
            )
        elif region.namespace == owner.namespace:
            region.pinned = region.pinned or request.pinned
        result.capability = region.capability if region.private else b""
        if region.state is State.SEALED:
            result.there_before = chunks.size
            return None
        region.state = State.FILLING
        return region

    async def _work(self, job: Job, pinned: bool) -> None:
        sealed = False
        try:
            for attempt in itertools.count(1):
                before = len(job.done)
                foreman = self._foremen[job.device.identity] if job.device is not None else next(iter(self._foremen.values()))
                filler = await foreman.filler()
                try:
                    await self._move_all(job, filler)
                    break
                except FillerLost:
                    await filler.gone()
                    if attempt >= _TRIES and len(job.done) == before:
                        raise
                    logger.warning("a filler died while filling %s; going on with the next", job.region or "the arena")
            if job.region is not None and job.device is not None:
                job.device.seal(job.region)
                sealed = True
            else:
                keys = [(job.owner.namespace, chunk) for chunk in job.chunks.hashes]
                self._arena.add_set((job.owner.namespace, job.result.id), ChunkSet(keys, sum(job.chunks.sizes), pinned, []))
        finally:
            if job.region is not None and job.device is not None and not sealed:
                job.device.pause(job.region)
                if not job.done:
                    job.device.remove(job.region)
            for place in job.held:
                self._arena.release(place)
            close_all(job.files)
            self.jobs.discard(job)
            self._free_room()

    async def _move_all(self, job: Job, filler: FillerProcess) -> None:
        async with contextlib.AsyncExitStack() as stack:
            files = 0
            if job.files:
                files = next(_numbers)
                await filler.order(pb.Order(files=pb.OpenFiles(range=files)), job.files)
                stack.push_async_callback(_close, filler, files)
            peer = self._peer(job)
            if peer is not None:
                peer.readers += 1
                stack.callback(self._devices[peer.device].let_go, peer)
            target, source = await self._open(stack, filler, job, peer)
            missing = deque(index for index in range(len(job.chunks.sizes)) if index not in job.done)
            under_way: set[asyncio.Task[None]] = set()
            try:
                while missing or under_way:
                    while missing and len(under_way) < _UNDER_WAY and not job.stopped:
                        before = len(missing)
                        planned = self._plan(job, missing, target, files, source)
                        if not planned.steps:
                            if len(missing) == before:
                                break
                            continue  # all of these are in the arena already
                        under_way.add(self._spawn(self._move(job, filler, planned)))
                    if job.stopped and not under_way:
                        raise Cancelled(f"the fill of {job.region or 'the arena'} was stopped; what is there stays for the next")
                    if under_way:
                        finished, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                        for move in finished:
                            move.result()
                    elif missing:
                        await self._wait_for_room(job)
            finally:
                if under_way:
                    await asyncio.wait(under_way)

    async def _open(self, stack: contextlib.AsyncExitStack, filler: FillerProcess, job: Job, source: Region | None) -> tuple[int, int]:
        """Has the job's region and the source mapped by the filler, at the same time, until the stack ends; their numbers, 0 for none."""
        target = job.region
        wanted = [(next(_numbers) if region is not None else 0, region, region is target) for region in (target, source)]
        opened = await asyncio.gather(*(_open(filler, *each) for each in wanted), return_exceptions=True)
        for (number, region, _), failure in zip(wanted, opened, strict=True):
            if region is None or failure is not None:
                continue
            if job.device is not None and not job.device.memory.addressable:
                # The answer need not wait until the filler has unmapped a GPU's memory: an open mapping does not keep that from being
                # sealed, as it does with the host's.
                stack.callback(self._close_later, filler, number)
            else:
                stack.push_async_callback(_close, filler, number)
        for failure in opened:
            if failure is not None:
                raise failure
        return wanted[0][0], wanted[1][0]

    def _plan(self, job: Job, missing: deque[int], target: int, files: int, source: int) -> Planned:
        """The next move. Takes its chunks out of `missing`, and room for them in the arena; it ends early where the arena has no more.

        Raises:
            NotFound: nothing brings the next chunk.
        """
        planned = Planned()
        size = 0
        while missing and size < (PEER_MOVE if source else MOVE):
            index = missing[0]
            step = pb.Step(size=job.chunks.sizes[index], hash=job.chunks.hashes[index])
            if job.region is not None:
                step.target, step.target_offset = target, job.chunks.offsets[index]
            if source:
                step.source, step.source_offset = source, job.chunks.offsets[index]
                planned.add(index, step, "from_device")
            elif (place := self._arena.find(job.owner.namespace, step.hash)) is not None:
                self._arena.retain(place)
                if job.region is None:
                    job.held.append(place)
                    job.done.add(index)
                    job.result.there_before += step.size
                else:
                    step.arena_offset = place.offset
                    planned.places.append((place, b""))
                    planned.add(index, step, "from_arena")
            else:
                if index not in job.sources:
                    if planned.steps:
                        break
                    raise NotFound(
                        f"chunk {index} ({step.hash.hex()[:12]}) is not in the arena, and no source brings it: send the file that has it"
                    )
                step.files = files
                step.file, step.file_offset = job.sources[index]
                if job.device is None or not job.device.memory.addressable:
                    place = self._arena.make_room(step.size, step.file_offset, job.kept)
                    if place is None:
                        break
                    step.arena_offset = place.offset
                    planned.places.append((place, step.hash))
                planned.add(index, step, "from_files")
            missing.popleft()
            size += step.size
        return planned

    async def _move(self, job: Job, filler: FillerProcess, planned: Planned) -> None:
        moved = False
        try:
            await filler.order(pb.Order(move=pb.Move(steps=planned.steps)))
            moved = True
        finally:
            for place, loaded in planned.places:
                if moved and loaded:
                    self._arena.publish(place, job.owner.namespace, loaded)
                if moved and job.region is None:
                    job.held.append(place)
                else:
                    self._arena.release(place)
            self._free_room()
        job.done.update(planned.chunks)
        for origin, count in planned.bytes.items():
            setattr(job.result, origin, getattr(job.result, origin) + count)

    async def _wait_for_room(self, job: Job) -> None:
        """Returns when the arena may have room again. Raises OutOfMemory if nobody will make any."""
        if job.spare or all(other.waiting for other in self.jobs if other is not job):
            raise OutOfMemory(
                f"the arena of {self._arena.size} bytes has no room for a chunk: {self._arena.used} bytes are used, what is not pinned or "
                "being filled was evicted; evict or unpin sets of chunks, or serve with a larger --arena"
            )
        job.waiting = True
        await self._room.wait()
        job.waiting = False

    def _free_room(self) -> None:
        self._room.set()
        self._room = asyncio.Event()

    def _peer(self, job: Job) -> Region | None:
        """The same region on another device, if bytes can come straight from there."""
        if job.region is None or job.device is None or job.device.memory.addressable:
            return None
        for other in self._devices.values():
            if other is not job.device and not other.memory.addressable:
                for namespace in (job.owner.namespace, ""):
                    found = other.regions.get((namespace, job.region.id))
                    if found is not None and found.state is State.SEALED and (found.namespace == job.owner.namespace or not found.private):
                        return found
        return None

    def _close_later(self, filler: FillerProcess, number: int) -> None:
        self._spawn(_close(filler, number))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # read, so that asyncio does not log it: whoever asked for a fill that was stopped is gone


async def _open(filler: FillerProcess, number: int, region: Region | None, writable: bool) -> None:
    if region is not None:
        pieces = pb.OpenRange(range=number, pieces=[slab.size for slab in region.slabs], writable=writable)
        await filler.order(pb.Order(open=pieces), [slab.fd for slab in region.slabs])


async def _close(filler: FillerProcess, number: int) -> None:
    with contextlib.suppress(FillerLost):  # what it had open went with it
        await filler.order(pb.Order(close=pb.CloseRange(range=number)))


def _check_sources(sources: Sequence[pb.Source], files: list[int], chunks: Chunks) -> dict[int, tuple[int, int]]:
    """File and offset of each chunk that has a source. Raises Invalid."""
    for index, fd in enumerate(files):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Invalid(f"sources: descriptor {index} is not a regular file")
    found: dict[int, tuple[int, int]] = {}
    for source in sources:
        end = source.first_chunk + source.chunks
        if source.file >= len(files) or end > len(chunks.sizes) or source.offset >= 1 << 62:
            raise Invalid(f"sources: chunks {source.first_chunk} to {end} of file {source.file}: there is no such file or chunk")
        offset = source.offset
        for index in range(source.first_chunk, end):
            if index in found:
                raise Invalid(f"sources: chunk {index} has two")
            found[index] = (source.file, offset)
            offset += chunks.sizes[index]
    return found
