"""From a command to a proved snapshot.

    start → healthy → recorded request → quiet → dump → snapshot-complete → split into chunks → restore once and ask again → publish

The source is never harmed: CRIU leaves it running, whatever happens. A snapshot gets its name last, when its replica has given the answer.
The disk has to have room for it as it begins, by what the last one of its name took, and again before the dump, by what its engine holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from restore_agent.drivers.criu import Criu
from restore_agent.drivers.cuda import Cuda
from restore_agent.drivers.weights import Weights
from restore_agent.engine import renewal
from restore_agent.engine.adapters import prove_adapters, record_adapters
from restore_agent.engine.canary import prove_canary, record_canary
from restore_agent.engine.engine import Engine
from restore_agent.pages.images import mend_timers, split
from restore_agent.places.cache_watch import CacheWatch
from restore_agent.places.left_behind import ipc_objects, refuse_left_behind
from restore_agent.places.place import Output, Place
from restore_agent.places.processes import private_bytes
from restore_agent.places.sandboxes import Sandboxes
from restore_agent.places.shared_folders import caches, resolved
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.dumped import Dumped
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.restore import OpenPlace, Restorer
from restore_agent.sequences.second_best import keep_beside_weights
from restore_agent.sequences.staging import Staging
from restore_agent.snapshots import compile_caches
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.chunks import Lease, write_chunks
from restore_agent.snapshots.compatibility import node_fits
from restore_agent.snapshots.manifest import (
    CHECKPOINTS,
    AdapterRecord,
    CanaryRecord,
    ChunkRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    TemplateRecord,
    WeightsRegion,
    digest_of,
    layout_file,
)
from restore_agent.snapshots.page_runs import Pages, write_index
from restore_agent.snapshots.store import NameTaken, Store, record_file
from restore_agent.snapshots.unusable import Unusable
from restore_agent.workload.control_directory import SNAPSHOT_COMPLETE
from zerowake_shared.background import to_its_end
from zerowake_shared.discard import discard
from zerowake_shared.phases import Phase

_Answers = tuple[CanaryRecord, tuple[AdapterRecord, ...]]
_DUMP_SECONDS = 600.0
_WRITTEN = (
    "the engine wrote {}: that is in the snapshot, and each replica goes on with a copy of its own, which ends with it. "
    "Name folders whose files others read, or that shall stay, with --shared"
)
Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all (0: it counts none)


@dataclass(frozen=True)
class CaptureRequest:
    """What a snapshot is taken of, and under which name."""

    namespace: str
    name: str
    model: str
    engine: EngineRecord
    canary_path: str = ""
    canary_body: str = ""
    adapters: tuple[str, ...] = ()  # names that the server answers to besides, where it does not list them itself
    replace: bool = False
    weights: Path | None = None
    template: TemplateRecord | None = None


class Room(Protocol):
    """Makes room on the disk for so many bytes of what is named, or raises Full."""

    def __call__(self, wanted: str, size: int) -> Awaitable[None]: ...


@dataclass(frozen=True)
class Captured:
    """A published snapshot, and the engine that it was taken of."""

    snapshot: Snapshot
    source: Engine  # still running; the caller's to keep or close
    notes: tuple[str, ...] = ()  # what its user should know


class Capturer:
    """Takes snapshots, with what the node has for it."""

    def __init__(
        self,
        criu: Criu,
        cuda: Cuda | None,
        weights: Weights,
        sandboxes: Sandboxes,
        store: Store,
        staging: Staging,
        restorer: Restorer,
        room: Room,
    ) -> None:
        self._criu = criu
        self._cuda = cuda
        self._weights = weights
        self._sandboxes = sandboxes
        self._store = store
        self._staging = staging
        self._restorer = restorer
        self._room = room

    async def capture(self, request: CaptureRequest, progress: Progress, phases: Phases, open_place: OpenPlace | None = None) -> Captured:
        """Nothing is left of it when it fails. `open_place`: opens where the engine runs, and then, in its stead, the replica that proves.

        Raises:
            EngineError, PlaceError, LeftBehind, CriuError, CudaError, WeightsError, ImageError, NameTaken, Unproved, RestoreFailed,
            NoSigningKey, Untrusted: before anything is done; Full: the disk has no room for it; OSError.
        """
        await self._check_may_begin(request)
        async with contextlib.AsyncExitStack() as undo:
            lent: list[WeightsRegion] = []
            if request.weights:
                with _step(Phase.WEIGHTS, phases, progress):
                    lent.append(await self._weights.read(request.weights))
                    device = self._cuda.chosen(request.engine.env) if self._cuda else ""
                    await self._weights.fill(lent[0], device)
                lends = self._weights.environment(lent[0].record, device)
                request = dataclasses.replace(request, engine=request.engine.model_copy(update={"env": request.engine.env | lends}))
            with _step(Phase.START, phases, progress):
                if open_place is None:
                    request = dataclasses.replace(request, engine=await asyncio.to_thread(_sharing, request.engine))
                place = await (open_place or functools.partial(self._sandboxes.create, request.engine.shared))()
                undo.push_async_exit(place)
                output = place.output(request.model)
                undo.callback(output.close)
                before = await asyncio.to_thread(ipc_objects, place.host_pids().get(1, 0))
                watch = undo.enter_context(await CacheWatch.begun(await asyncio.to_thread(place.compile_caches, request.engine.env)))
                source = await _start(request.engine, place, output)
            with _step(Phase.READY, phases, progress):
                await source.wait_healthy(or_ready=True)
            # An engine that quiesces may not answer from here to the end of the dump, and is asked then; others warm up by the request.
            with _step(Phase.REQUEST, phases, progress):
                answers = None
                # The second answer stands: what the first leaves behind (a cached prefix, and sums in another order) is in the image.
                for _ in range(2):
                    if not source.is_ready:
                        answers = await source.unless_ready(_answers(source, request))
            with _step(Phase.QUIESCE, phases, progress):
                quiesces = await source.wait_quiet()
                await asyncio.to_thread(refuse_left_behind, source.pid, place.host_pids(), before)
            undo.push_async_callback(asyncio.to_thread, self._store.sweep)  # once the lease has ended
            with self._store.chunks.lease() as lease:
                workspace = await asyncio.to_thread(self._store.workspace)
                undo.push_async_callback(asyncio.to_thread, discard, workspace)
                with _step(Phase.CACHES, phases, progress):
                    notes = await _keep_caches(watch, workspace)
                with _step(Phase.WEIGHTS, phases, progress):
                    lent += await self._published(source, workspace)
                for region in lent:
                    await asyncio.to_thread(_keep_weights, workspace, region, self._sandboxes.checkpoints)
                draft, same = await self._dump(request, place, source, answers, quiesces, workspace, lease, progress, phases)
                if lent:
                    records = tuple(region.record for region in lent)
                    draft = _draft(draft.manifest.model_copy(update={"weights": records}), workspace)
                with _step(Phase.PROVE, phases, progress):
                    await self._prove(draft, open_place, place.gpus)
                with _step(Phase.PUBLISH, phases, progress):
                    publish = functools.partial(self._store.publish, workspace, draft.manifest, lease, replace=request.replace)
                    snapshot = await to_its_end(asyncio.to_thread(publish))
            undo.pop_all()
            return Captured(snapshot, source, (*notes, *await _told(place), *([same] if same else [])))

    async def _check_may_begin(self, request: CaptureRequest) -> None:
        """Before an engine is started for nothing. Raises NoSigningKey, NameTaken, Full."""
        await asyncio.to_thread(self._check_may_publish, request)
        if last := await asyncio.to_thread(self._bytes_of_the_last, request):
            await self._room(f"snapshot {request.namespace}/{request.name} (what the last one took)", last)

    def _check_may_publish(self, request: CaptureRequest) -> None:
        """Raises NoSigningKey, NameTaken."""
        self._store.keyring.check_signs()
        if not request.replace:
            with contextlib.suppress(NotFound):
                try:
                    self._store.get(request.namespace, request.name)
                except Unusable as error:
                    raise NameTaken(f"snapshot {request.namespace}/{request.name} exists already, and cannot be used: {error}") from None
                raise NameTaken(f"snapshot {request.namespace}/{request.name} exists already")

    def _bytes_of_the_last(self, request: CaptureRequest) -> int:
        """Of pages, in the snapshot that this one replaces; 0: there is none, or it is another engine's."""
        with contextlib.suppress(NotFound, Unusable):
            last = self._store.get(request.namespace, request.name).manifest
            return last.page_bytes if last.engine.command == request.engine.command else 0
        return 0

    async def _published(self, source: Engine, workspace: Path) -> list[WeightsRegion]:
        """The weights that the engine has brought into gpumem by itself. Raises EngineError, PlaceError, WeightsError."""
        found, folder = [], await asyncio.to_thread(workspace.resolve)
        for number, (named, gpu) in enumerate(source.named_weights().items()):
            directory = await to_its_end(source.place.checkpoint(named, workspace / CHECKPOINTS / str(number)))
            found.append((await self._weights.read(directory)).within(folder).on(gpu))
        return found

    async def _dump(
        self,
        request: CaptureRequest,
        place: Place,
        source: Engine,
        answers: _Answers | None,
        quiesces: bool,
        workspace: Path,
        lease: Lease,
        progress: Progress,
        phases: Phases,
    ) -> tuple[Snapshot, str]:
        """What was dumped, and in words what each replica will have in common with the others."""
        images = workspace / "images"
        images.mkdir()
        inside = {pid: host for pid, host in place.host_pids().items() if pid != 1}
        holders = self._cuda.holders(inside.values()) if self._cuda else []
        freed: dict[str, int] | None = None
        dumped: list[Dumped] = []

        async def look() -> None:
            dumped.append(await Dumped.of(place, images, holders))

        try:
            if self._cuda and holders:
                with _step(Phase.SUSPEND, phases, progress):
                    freed = await self._cuda.suspend(holders, place.gpus)
            # The least that it takes: its dump lies there beside its chunks, of which others may have some already.
            holds = await asyncio.to_thread(private_bytes, inside.values())
            await self._room(f"snapshot {request.namespace}/{request.name} (what its engine holds)", holds)
            with _step(Phase.DUMP, phases, progress):
                await self._criu.dump(place, source.pid, images, _DUMP_SECONDS, look)
        finally:
            try:
                if self._cuda and freed is not None:
                    with _step(Phase.RESUME, phases, progress):
                        await asyncio.shield(self._cuda.resume(holders))
            finally:
                source.tell(SNAPSHOT_COMPLETE)
        source.gpu_bytes = freed or {}
        gpus = self._cuda.gpus(place.gpus) if self._cuda and holders else None
        if answers is None:
            await source.wait_healthy()
            answers = await _answers(source, request)
        canary, adapters = answers
        (found,) = dumped
        with _step(Phase.SPLIT, phases, progress):
            await asyncio.to_thread(mend_timers, images)
            total = sum(pages.stat().st_size for pages in images.glob("pages-*.img"))
            await self._room(f"snapshot {request.namespace}/{request.name}", total)
            counted = _count(split(images), lambda done: progress(Phase.SPLIT, done, total))
            chunks, index = await to_its_end(asyncio.to_thread(write_chunks, lease, counted))
            write_index(workspace / "pages.index", index)
            for name, content in found.carried.items():
                await asyncio.to_thread((workspace / name).write_bytes, content)
            for leftover in images.glob("stats-*"):
                leftover.unlink()
            manifest = Manifest(
                namespace=request.namespace,
                name=request.name,
                model=request.model,
                created=found.moment.isoformat(timespec="milliseconds"),
                engine=request.engine,
                canary=canary,
                adapters=adapters,
                processes=found.processes,
                root_pid=source.pid,
                stdio=source.output.keys,
                files=await asyncio.to_thread(_records, workspace),
                chunks=tuple(ChunkRecord(hash=chunk.hash, size=chunk.size) for chunk in chunks),
                host_bytes=found.resident_bytes,
                gpus=freed or {},
                wake_bytes=source.wake_bytes() if freed else {},
                quiesces=quiesces,
                template=request.template,
                cold_seconds=round(phases.seconds(Phase.START) + phases.seconds(Phase.READY), 3),
                fits=await asyncio.to_thread(node_fits, self._criu.version, found.used, gpus, place.files, self._store.hashes),
            )
        return _draft(manifest, workspace), found.note

    async def _prove(self, draft: Snapshot, open_place: OpenPlace | None, given: Sequence[str] | None) -> None:
        await self._prove_once(draft, open_place, given)
        if open_place is None:  # it has a layer of its own each time
            # What the first replica left in shared folders, and what the source did meanwhile, must not matter to another.
            await self._prove_once(draft, open_place, given)

    async def _prove_once(self, draft: Snapshot, open_place: OpenPlace | None, given: Sequence[str] | None) -> None:
        try:
            engine = await self._restorer.restore(draft, Phases(), open_place, given)
        except RestoreFailed as error:
            if folder := next((folder for folder in draft.manifest.engine.shared if f"{folder[1:]}/" in str(error)), ""):
                raise RestoreFailed(
                    error.reason,
                    f"{error}\n{folder} is shared, so what the engine keeps open there changes under its snapshot: have it opened for "
                    "appending (`>>`), or written elsewhere",
                ) from error
            raise
        try:
            assert draft.manifest.canary is not None
            await prove_canary(engine, draft.manifest.canary)
            await prove_adapters(engine, draft.manifest.adapters)
        except BaseException:
            self._staging.unstage(draft.digest)
            raise
        finally:
            await engine.place.close()
            engine.output.close()


async def _told(place: Place) -> list[str]:
    """What its engine wrote, in words."""
    written = await asyncio.to_thread(place.written)
    return [_WRITTEN.format(written)] if written else []


async def _start(record: EngineRecord, place: Place, output: Output) -> Engine:
    """With what renews its random state, where that is wanted and the place is a sandbox. Raises PlaceError."""
    if place.is_ours and record.env.get(renewal.WANTED):
        record = record.model_copy(update={"env": await asyncio.to_thread(renewal.lay_out, place, record.env)})
    return await Engine.start(record, place, output, for_snapshot=True)


async def _answers(source: Engine, request: CaptureRequest) -> _Answers:
    """The model's, then its adapters', in the order in which they are asked for again. Raises EngineError."""
    canary = await record_canary(source, request.canary_path, request.canary_body)
    return canary, await record_adapters(source, canary, request.adapters)


@contextlib.contextmanager
def _step(name: Phase, phases: Phases, progress: Progress) -> Iterator[None]:
    progress(name, 0, 0)
    with phases.phase(name):
        yield


def _count(runs: Iterable[Pages], report: Callable[[int], None]) -> Iterator[Pages]:
    done = reported = 0
    for run in runs:
        yield run
        done += run.length
        if done - reported >= 64 << 20:
            report(done)
            reported = done


def _sharing(engine: EngineRecord) -> EngineRecord:
    """With the shared folders as they are found now: a cache that comes into being later is in this snapshot's layer. Raises PlaceError."""
    return engine.model_copy(update={"shared": resolved((*engine.shared, *caches(engine.env)))})


async def _keep_caches(watch: CacheWatch, workspace: Path) -> list[str]:
    """What it has used of them until it was quiet, for cold starts elsewhere; and in words what is left out. Raises OSError."""
    used = await watch.used()
    watch.close()  # before the dump, which nothing else shall look at
    found = {variable: (watch.folders[variable], names) for variable, names in used.items()}
    _, notes = await to_its_end(asyncio.to_thread(compile_caches.keep, workspace, found))
    return notes


def _draft(manifest: Manifest, workspace: Path) -> Snapshot:
    return Snapshot(digest_of(manifest.encode()), manifest, workspace)


def _keep_weights(workspace: Path, region: WeightsRegion, checkpoints: Path) -> None:
    """All of them but their bytes."""
    path = workspace / layout_file(region.record)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(region.layout)
    keep_beside_weights(region, checkpoints, workspace)


def _records(folder: Path) -> dict[str, FileRecord]:
    """All but weights, whose chunks gpumem verifies wherever it reads them."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(name): record_file(folder / name) for name in found if name.parts[0] != CHECKPOINTS}
