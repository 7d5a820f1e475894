"""A snapshot on its way onto this node's disk, from any number of stores and other agents.

Nothing is believed before it was verified: the record of the name (signed, and not older than one that was seen), then the manifest
(signed), then every byte by the hash that the manifest names, as it streams. The name stands on this node last, when all of it is there.

What has arrived stays when a pull is ended, also by the end of the agent, and the next one of the same snapshot fetches the rest: chunks
are in the store already, small files in the folder that will be the snapshot's, weights in a folder beside the one that will be theirs,
where they are hashed again before they count. Other agents are given each piece from the moment it is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from restore_agent.errors import FAILURES
from restore_agent.snapshots.catalog import Corrupt, NotFound, Snapshot
from restore_agent.snapshots.chunks import Chunk, Lease
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.keyring import Signature, Untrusted
from restore_agent.snapshots.manifest import Manifest, WeightsRecord, check_name, layout_file
from restore_agent.snapshots.names import SeenNames
from restore_agent.snapshots.store import NameTaken, Store
from restore_agent.snapshots.unfit import Unfit, of_use
from restore_agent.transfer.cascade import Cascade
from restore_agent.transfer.contents import InFile, in_files, named
from restore_agent.transfer.exchange import Fleet
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.finding import manifest_of, newest_record, stands_for
from restore_agent.transfer.offers import Offered
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.source import Full, Source
from zerowake_shared import durable

_SPARE = 64 << 20  # bytes of the disk that a pull leaves free
_LOG = logging.getLogger("zerowake.agent")


class Puller:
    """Brings snapshots from these stores, the best first."""

    def __init__(
        self,
        store: Store,
        seen: SeenNames,
        sources: Sequence[Source],
        fleet: Callable[[str, str], Fleet | None] = lambda *_: None,
        fits: Callable[[Manifest], None] = lambda manifest: None,
        left: Callable[[Source, Exception], None] = lambda source, error: None,
        room: Callable[[str, int], Awaitable[None]] | None = None,
        unfit: Unfit | None = None,
    ) -> None:
        """`fleet`: the other agents that have the snapshot of a namespace and digest or fetch it, with those stores as their origins.
        `fits`: is asked in a thread before any of it is fetched, and raises Incompatible. `left`: hears of each source that did not
        give something, and why. `room`: makes room for so many bytes of a digest, or raises Full; None: what is free is all there is.
        `unfit`: where that is brought which a snapshot that does not fit has for cold starts."""
        self._store = store
        self._seen = seen
        self._sources = sources
        self._fleet = fleet
        self._fits = fits
        self._left = left
        self._room = room
        self._unfit = unfit

    async def pull(
        self,
        namespace: str,
        name: str,
        digest: str = "",
        *,
        replace: bool = False,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Snapshot:
        """The snapshot of that name; with `digest` that one, whatever the name stands for. One that is here already costs nothing.

        Raises:
            NotElsewhere: no store has it. Denied, Unreachable, Altered: what the gravest of the stores did, and what the others did.
            Untrusted, Replayed: what the stores have is not to be believed here.
            NameTaken: another one has the name on this node, and not `replace`. What `fits` raises.
            Full, OSError: this node's disk. Nothing of these has changed what the name stands for here.
        """
        check_name("namespace", namespace)
        check_name("name", name)
        if not digest:
            record = await newest_record(self._sources, self._store.keyring, namespace, name, self._left)
            digest = await stands_for(record, self._seen)
        with contextlib.suppress(NotFound, Corrupt, Untrusted):
            return await asyncio.to_thread(self._store.get, namespace, name, digest)
        if not replace and await asyncio.to_thread(self._store.has_name, namespace, name):
            raise NameTaken(f"snapshot {namespace}/{name} exists already, and is another one than the stores have")
        fleet = self._fleet(namespace, digest)
        sources = fleet.sources if fleet else self._sources
        data, signature, manifest = await manifest_of(sources, self._store.keyring, namespace, name, digest, self._left)
        try:
            await asyncio.to_thread(self._fits, manifest)
        except Incompatible as error:
            await self._bring_second_best(sources, manifest, digest, data, signature, error)
            raise
        offered = Offered(namespace, digest, data, signature.encode(), named(manifest), all_named=not manifest.weights)
        with self._store.chunks.lease() as lease, fleet.offering(offered) if fleet else contextlib.nullcontext():
            arrival = _Arrival(self._store, manifest, digest, data, lease, progress, offered, self._room)
            await arrival.bring(lambda moved: fleet.bringing(moved, self._left) if fleet else self._fetch(sources, moved))
            return await asyncio.to_thread(self._store.adopt, arrival.workspace, data, signature, lease, replace=replace)

    async def _bring_second_best(
        self, sources: Sequence[Source], manifest: Manifest, digest: str, data: bytes, signature: Signature, why: Incompatible
    ) -> None:
        """Of one that does not fit: what a cold start finds here. It fails as nothing that anybody asked for: that is logged."""
        only = of_use(manifest)
        if self._unfit is None or not only or self._unfit.has(manifest.namespace, manifest.name, digest):
            return
        named = f"snapshot {manifest.namespace}/{manifest.name}@{digest[:12]}"
        brought = Progress(0, 0, 0)

        def tell(progress: Progress) -> None:
            nonlocal brought
            brought = progress

        try:
            store = await asyncio.to_thread(self._unfit.opened)
            with store.chunks.lease() as lease:
                arrival = _Arrival(
                    store, manifest, digest, data, lease, tell, Offered(manifest.namespace, digest, b"", b"", ()), None, only
                )
                await arrival.bring(lambda moved: self._fetch(sources, moved))
                await asyncio.to_thread(store.adopt, arrival.workspace, data, signature, lease, replace=True, only=only)
        except FAILURES as error:
            _LOG.warning("%s does not fit, and what it has for cold starts did not come: %s", named, error)
        else:
            _LOG.info("%s does not fit, and what it has for cold starts is here, %.1f MB: %s", named, brought.total / 1e6, why)

    def _fetch(self, sources: Sequence[Source], moved: Callable[[int], None]) -> Fetch:
        return Fetch(lambda chunk: sources, moved=moved, left=self._left)


class _Arrival:
    """One snapshot while it comes."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        digest: str,
        data: bytes,
        lease: Lease,
        progress: Callable[[Progress], None],
        offered: Offered,
        room: Callable[[str, int], Awaitable[None]] | None,
        only: Collection[str] | None = None,
    ) -> None:
        """`only`: of its files these alone, no page, and no weights but those that have files among them."""
        self._store = store
        self._chunks = manifest.chunks if only is None else ()
        self._files = {name: record for name, record in manifest.files.items() if only is None or name in only}
        self._regions = [record for record in manifest.distinct_weights if layout_file(record) in self._files]
        self._room = room
        self._lease = lease
        self._tell = progress
        self._offered = offered
        self._data, self._digest = data, digest
        self._done, self._moved, self._total = 0, 0, 0
        self.workspace = Path()

    async def bring(self, ways: Callable[[Callable[[int], None]], Fetch | Cascade]) -> None:
        """Everything but the name. `ways`: makes what brings chunks, of who hears of bytes that came."""
        chunks = self._store.chunks
        pages = {chunk.hash: Chunk(chunk.hash, chunk.size) for chunk in self._chunks}
        self._lease.hold([self._digest, *pages, *(record.region for record in self._regions)])
        self.workspace = await asyncio.to_thread(self._store.arrivals.begin, self._digest, self._data)
        names: dict[Chunk, list[str]] = defaultdict(list)
        for name, record in self._files.items():
            names[Chunk(record.hash, record.size)].append(name)
        files = await asyncio.to_thread(lambda: [chunk for chunk in names if not all(self._has_file(name, chunk) for name in names[chunk])])
        missing = await asyncio.to_thread(lambda: [chunk for chunk in pages.values() if not chunks.has(chunk)])
        weights = sum(record.size for record in self._regions)
        self._total = sum(chunk.size for chunk in [*names, *pages.values()]) + weights
        self._done = self._total - weights - sum(chunk.size for chunk in [*files, *missing])
        self._tell(Progress(self._done, 0, self._total))  # so that who comes beside counts with it
        here = await asyncio.to_thread(self._weights_here)
        await self._make_room(self._total - self._done - here)
        for chunk in names.keys() - set(files):
            self._offered.arrived(chunk, self.workspace / names[chunk][0])
        for chunk in set(pages.values()) - set(missing):
            self._offered.arrived(chunk, chunks.path(chunk.hash))
        way = ways(self._came)
        await way.bring_all(
            files,
            lambda chunk, data: self._keep_file(names[chunk], data),
            lambda chunk: self._offered.arrived(chunk, self.workspace / names[chunk][0]),
        )
        parts = {record.region: await self._parts(record) for record in self._regions}
        self._offered.name(part.chunk for each in parts.values() for part in each)
        for region in self._regions:
            await self._bring_weights(region, parts[region.region], way)
        await way.bring_all(missing, chunks.write, lambda chunk: self._offered.arrived(chunk, chunks.path(chunk.hash)))

    async def _parts(self, record: WeightsRecord) -> list[InFile]:
        return list(in_files(record, await asyncio.to_thread(Path.read_bytes, self.workspace / layout_file(record))))

    async def _bring_weights(self, record: WeightsRecord, parts: Sequence[InFile], way: Fetch | Cascade) -> None:
        size = sum(part.chunk.size for part in parts)
        self._total += size - record.size  # which has padding
        whole = self.workspace if not record.folder else self._store.fetched_weights(record)
        if await asyncio.to_thread(_are_here, record, parts, whole):
            self._counted(size)
            self._offer(parts, whole if await asyncio.to_thread(whole.is_dir) else Path(record.folder))
            return
        folder = self.workspace if not record.folder else whole.with_name(f"{whole.name}.arriving")
        lacking = await asyncio.to_thread(lambda: [part for part in parts if not _has_part(folder, part)])
        await self._make_room(sum(part.chunk.size for part in lacking))  # by the layout, which may say more
        there: dict[Chunk, list[InFile]] = defaultdict(list)
        for each in lacking:
            there[each.chunk].append(each)
        self._counted(size - sum(chunk.size for chunk in there))
        self._offer(set(parts) - set(lacking), folder)

        def keep(chunk: Chunk, data: memoryview) -> None:
            for part in there[chunk]:
                _write_part(folder, part, data)

        await way.bring_all(there, keep, lambda chunk: self._offer(there[chunk], folder))
        await asyncio.to_thread(_sync_files, folder, {part.path for part in parts})
        if folder != whole:
            await asyncio.to_thread(folder.replace, whole)
            await asyncio.to_thread(durable.sync_folder, whole.parent)
            self._offer(parts, whole)

    def _offer(self, parts: Iterable[InFile], folder: Path) -> None:
        for part in parts:
            self._offered.arrived(part.chunk, folder / part.path, part.offset)

    def _came(self, count: int) -> None:
        self._moved += count
        self._counted(count)

    def _counted(self, count: int) -> None:
        self._done += count
        self._tell(Progress(self._done, self._moved, self._total))

    def _weights_here(self) -> int:
        """Bytes of regions that are here, or whose model's own folder is: so they seem, before their layouts say what they are made of."""
        fetched = self._store.fetched_weights
        return sum(each.size for each in self._regions if fetched(each).is_dir() or _is_folder(each.folder))

    async def _make_room(self, size: int) -> None:
        if self._room:
            await self._room(self._digest, size)
        await asyncio.to_thread(self._check_room, size)

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self._store.state).free
        if free < size + _SPARE:
            raise Full(
                f"{self._store.state} has {free >> 20} MiB free, and {size >> 20} MiB of the snapshot have to come: remove another "
                "(`zerowake snapshot rm`), or make room"
            )

    def _has_file(self, name: str, chunk: Chunk) -> bool:
        data = durable.content(self.workspace / name)
        return data is not None and len(data) == chunk.size and blake3(data).hexdigest() == chunk.hash

    def _keep_file(self, names: Iterable[str], data: memoryview) -> None:
        for name in names:
            path = self.workspace / name
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(path, bytes(data))


def _is_folder(path: str) -> bool:
    return bool(path) and Path(path).is_dir()


def _are_here(record: WeightsRecord, parts: Sequence[InFile], whole: Path) -> bool:
    """Whether nothing of the region has to come: it came before, or the model's own folder is on this node, too."""
    if not record.folder:
        return False
    return whole.is_dir() or all(_has_part(Path(record.folder), part) for part in parts)


def _has_part(folder: Path, part: InFile) -> bool:
    try:
        with (folder / part.path).open("rb") as file:
            file.seek(part.offset)
            return blake3(file.read(part.chunk.size)).hexdigest() == part.chunk.hash
    except FileNotFoundError:
        return False


def _write_part(folder: Path, part: InFile, data: memoryview) -> None:
    path = folder / part.path
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], part.offset + done)
    finally:
        os.close(fd)


def _sync_files(folder: Path, paths: Iterable[str]) -> None:
    for path in paths:
        fd = os.open(folder / path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
