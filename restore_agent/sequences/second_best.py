"""What a snapshot still does for a cold start where it cannot be restored: the engine finds what others have compiled and loaded.

Compile caches are put where the engine looks for them, on the machine or in its pod's container; weights that it had published for gpumem
are put where it would publish them on the machine, so that it maps a region instead of loading the model. Both only where nothing is,
and both only of a snapshot whose signature counts here: what is in them is run. Whether they are of use the engine itself finds out, by the
keys of its caches and the name of its weights' folder: what was made by another version, or for another GPU or processor, lies there
unused.

None of it makes a cold start fail, or anybody ask for it: what cannot be laid out is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from restore_agent.errors import FAILURES
from restore_agent.places.acting_as import User, acting_as
from restore_agent.places.compile_folders import compile_folders
from restore_agent.places.container import Container
from restore_agent.places.laid_out_caches import CannotLayOut, LaidOutCache
from restore_agent.sequences.phases import Phases
from restore_agent.snapshots.catalog import Catalog, Snapshot
from restore_agent.snapshots.compile_caches import INDEX, CacheFile, CacheIndex, contents
from restore_agent.snapshots.manifest import EngineRecord, WeightsRecord, WeightsRegion, beside_weights, published
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unfit import Unfit
from zerowake_shared import durable
from zerowake_shared.background import to_its_end
from zerowake_shared.discard import discard
from zerowake_shared.phases import Phase

_MOST_BESIDE = 64 << 20  # bytes of what lies beside weights
_LOG = logging.getLogger("zerowake.agent")


class SecondBest:
    """Of one node."""

    def __init__(self, store: Store, checkpoints: Path, unfit: Unfit) -> None:
        """`checkpoints`: the folder in which engines publish weights for gpumem. `unfit`: what there is of snapshots that do not fit."""
        self._store = store
        self._unfit = unfit
        self._checkpoints = checkpoints
        self._one_at_a_time = asyncio.Lock()

    async def lay_out(self, snapshot: Snapshot, record: EngineRecord, phases: Phases) -> None:
        """Before an engine is started cold by `record`, since this snapshot, or one of which no more than this is here, could not be
        restored."""
        with phases.phase(Phase.IMAGE_CACHES):
            async with self._one_at_a_time:
                try:
                    await to_its_end(asyncio.to_thread(self._lay_out, snapshot, record))
                except FAILURES as error:
                    _LOG.warning("what snapshot %s has for cold starts is left out: %s", snapshot, error)

    async def lay_out_in(self, container: Container, snapshot: Snapshot, phases: Phases) -> None:
        """The same in a container whose own command is about to go on: its compile caches. Its own command loads its weights itself."""
        if INDEX not in snapshot.manifest.files:
            return
        with phases.phase(Phase.IMAGE_CACHES):
            async with self._one_at_a_time:
                try:
                    await container.open()
                    await to_its_end(asyncio.to_thread(self._lay_out_in, container, snapshot))
                except FAILURES as error:
                    _LOG.warning("what snapshot %s has for cold starts is left out: %s", snapshot, error)

    def _lay_out(self, snapshot: Snapshot, record: EngineRecord) -> None:
        with self._held(snapshot) as catalog:
            folders = {variable: Path(path) for variable, path in compile_folders(record.env).items()}
            lay_out_caches(catalog, snapshot, folders)
            lay_out_weights(catalog, snapshot, self._checkpoints)

    def _lay_out_in(self, container: Container, snapshot: Snapshot) -> None:
        with self._held(snapshot) as catalog:
            lay_out_caches(catalog, snapshot, container.compile_caches({}), container.user, container.root)

    @contextlib.contextmanager
    def _held(self, snapshot: Snapshot) -> Iterator[Catalog]:
        """Where it lies. What is here of one that does not fit may go meanwhile, and is left out then."""
        if snapshot.directory.is_relative_to(self._unfit.folder):
            self._unfit.used(snapshot)
            yield self._unfit.catalog
        else:
            with self._store.hold(snapshot):
                yield self._store


def lay_out_caches(
    catalog: Catalog, snapshot: Snapshot, folders: Mapping[str, Path], user: User | None = None, root: Path = Path("/")
) -> None:
    """A snapshot's compile caches, where an engine looks for them. Blocks.

    Args:
        folders: by the variables that name them. user: the engine's, where that is not the agent's own: what is written is written as by
            that one. root: of its file system.

    Raises Corrupt, InvalidCaches, NotFound: nothing, or not all of them, has been laid out then.
    """
    if INDEX not in snapshot.manifest.files:
        return
    own = User(os.geteuid(), os.getegid())

    def read(name: str) -> bytes:
        with acting_as(own):
            return verified(name)

    def verified(name: str) -> bytes:
        if name not in snapshot.manifest.files:
            raise catalog.fault(snapshot, f"its manifest names no {name}, which its compile caches are in; take the snapshot again")
        return catalog.read_file(snapshot, name, snapshot.manifest.files[name])

    index = CacheIndex.decode(read(INDEX))
    with ExitStack() as held:
        held.enter_context(acting_as(user or own))
        wanted: dict[str, tuple[str, LaidOutCache, list[CacheFile]]] = {}
        for cache in index.caches:
            if path := folders.get(cache.variable):
                folder = f"/{path.relative_to(root)}"
                try:
                    there = held.enter_context(LaidOutCache.held(path, user, folder))
                    if missing := there.missing(cache.files):
                        wanted[cache.variable] = folder, there, missing
                except CannotLayOut as error:
                    _LOG.warning("snapshot %s: %s", snapshot, error)
        for variable, files in itertools.groupby(contents(index, read) if wanted else (), lambda each: each[0]):
            if variable not in wanted:
                continue
            folder, there, missing = wanted[variable]
            try:
                there.lay_out(missing, _each((file, data) for _, file, data in files))
                size = sum(file.size for file in missing)
                _LOG.info("%d files, %.1f MB, of the compile cache of snapshot %s are in %s", len(missing), size / 1e6, snapshot, folder)
            except CannotLayOut as error:
                _LOG.warning("snapshot %s: %s", snapshot, error)


def _each(files: Iterator[tuple[CacheFile, bytes]]) -> Callable[[CacheFile], bytes]:
    """The contents of those that are asked for in their order."""

    def content(wanted: CacheFile) -> bytes:
        return next(data for file, data in files if file == wanted)

    return content


def keep_beside_weights(region: WeightsRegion, checkpoints: Path, workspace: Path) -> None:
    """Takes into what becomes a snapshot the small files that its engine has put beside weights of its own publishing. Blocks.

    `checkpoints`: the folder in which engines publish. Raises OSError.
    """
    if not _is_published(region.record, checkpoints):
        return
    weights = {part.path for part in region.record.parts}
    found = [path for path in sorted(region.folder.iterdir()) if path.name not in weights and stat.S_ISREG(path.lstat().st_mode)]
    if sum(path.stat().st_size for path in found) > _MOST_BESIDE:
        return
    for path in found:
        target = workspace / beside_weights(region.record, path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def lay_out_weights(catalog: Catalog, snapshot: Snapshot, checkpoints: Path) -> None:
    """Weights that its engine had published elsewhere, and that have come to this node, where the engine would publish them here. Blocks.

    Raises Corrupt, NotFound, OSError: nothing has been laid out then.
    """
    for region in catalog.regions(snapshot) if published(snapshot.manifest) else ():
        prefix = beside_weights(region.record, "")
        beside = {name.removeprefix(prefix): name for name in snapshot.manifest.files if name.startswith(prefix)}
        target = checkpoints / Path(region.record.folder).name
        if not beside or not region.record.folder or target == checkpoints or target.exists() or region.folder == target:
            continue
        fresh = checkpoints / f".{target.name}.{secrets.token_hex(4)}"
        try:
            for part in {part.path for part in region.record.parts}:
                (fresh / part).parent.mkdir(parents=True, exist_ok=True)
                os.link(region.folder / part, fresh / part)  # gpumem compares every chunk that it reads
            for name, kept in beside.items():
                (fresh / name).write_bytes(catalog.read_file(snapshot, kept, snapshot.manifest.files[kept]))
            durable.sync_tree(fresh)  # once it is there, nobody writes it anew
            fresh.rename(target)
        finally:
            discard(fresh)
        _LOG.info("the weights %s of snapshot %s are in %s", region.record.region[:12], snapshot, target)


def _is_published(record: WeightsRecord, checkpoints: Path) -> bool:
    return bool(record.folder) and Path(record.folder).parent == checkpoints.absolute()
