"""What this node offers to others of what it has: every snapshot that is whole on its disk and that it trusts.

A snapshot is looked at when it is asked for first: its manifest is verified, and where each chunk lies is noted. That is kept until its
folder or a key changes. Chunks of an image that stands in memory are given from there.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from restore_agent.errors import FAILURES
from restore_agent.snapshots.catalog import MANIFEST, NotFound, Snapshot
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.keyring import SIGNATURE
from restore_agent.snapshots.store import Store
from restore_agent.transfer.contents import in_files
from restore_agent.transfer.offers import Offered
from zerowake_shared import durable

_KEPT = 64  # snapshots that were asked for last
_LOG = logging.getLogger("zerowake.agent")


@dataclass(frozen=True, slots=True)
class _Look:
    """What was found at a snapshot, and what has to be as it was then for that to hold."""

    snapshot: Snapshot
    offered: Offered
    keys: object
    changed: int


class Offering:
    """The `at_rest` of a node's Offers. Any number of threads may call it; it blocks on the disk."""

    def __init__(self, store: Store, in_memory: Callable[[str, str], memoryview | None]) -> None:
        """`in_memory`: a chunk of a snapshot that stands in memory, by digest and hash."""
        self._store = store
        self._memory = in_memory
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Look] = OrderedDict()  # by digest

    def __call__(self, digest: str) -> Offered | None:
        with self._lock:
            kept = self._kept.pop(digest, None)
            try:
                look = kept if kept and self._holds(kept) else self._look(digest)
            except (NotFound, FileNotFoundError):
                return None
            except FAILURES as error:
                _LOG.warning("another agent asks for snapshot %s, which is not offered: %s", digest[:12], error)
                return None
            self._kept[digest] = look
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return look.offered

    def _holds(self, look: _Look) -> bool:
        return look.keys == self._store.keyring.identity and look.changed == look.snapshot.directory.stat().st_ctime_ns

    def _look(self, digest: str) -> _Look:
        keys = self._store.keyring.identity
        snapshot = self._store.of_digest(digest)
        changed = snapshot.directory.stat().st_ctime_ns
        return _Look(snapshot, self._offered(snapshot), keys, changed)

    def _offered(self, snapshot: Snapshot) -> Offered:
        manifest, signature = (durable.content(snapshot.directory / name) for name in (MANIFEST, SIGNATURE))
        if manifest is None or signature is None:
            raise NotFound(f"snapshot {snapshot} was removed meanwhile")
        places = {chunk: (self._store.chunks.path(chunk.hash), 0) for chunk in snapshot.chunks if self._store.chunks.has(chunk)}
        for name, record in snapshot.manifest.files.items():
            places[Chunk(record.hash, record.size)] = snapshot.directory / name, 0
        for region in self._store.regions(snapshot):
            for part in in_files(region.record, region.layout):
                places[part.chunk] = region.folder / part.path, part.offset
        memory = functools.partial(self._in_memory, snapshot.digest)
        offered = Offered(snapshot.manifest.namespace, snapshot.digest, manifest, signature, places, memory)
        for chunk, (path, offset) in places.items():
            offered.arrived(chunk, path, offset)
        return offered

    def _in_memory(self, digest: str, chunk: Chunk) -> memoryview | None:
        return self._memory(digest, chunk.hash)
