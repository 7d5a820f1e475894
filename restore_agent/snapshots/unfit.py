"""What snapshots that do not fit this node have for its cold starts: compile caches, and weights that their engines had published.

They lie in a store of their own below the state folder, `unfit/`, in which a snapshot is its signed manifest and those of its files, with
no page: so nothing that lists, stages, offers or counts this node's snapshots meets a half of one. They go when the whole snapshot comes
after all, when one of that name is removed here, when the disk is wanted for one that fits, and when no start has used them for a month;
and they may be lost.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from restore_agent.snapshots.catalog import Catalog, NotFound, Snapshot
from restore_agent.snapshots.compile_caches import is_cache
from restore_agent.snapshots.manifest import Manifest, beside_weights, layout_file, published
from restore_agent.snapshots.store import Store
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

FOLDER = "unfit"
_KEPT_SECONDS = 30 * 24 * 3600.0


class Unfit:
    """Beside the store of one node. Its calls block on the disk; any thread may make them."""

    def __init__(self, store: Store, clock: Clock = SYSTEM_CLOCK) -> None:
        self._keys = store.keyring.folder
        self._clock = clock
        self._lock = threading.Lock()
        self._store: Store | None = None
        self.folder = store.state / FOLDER
        self.catalog = Catalog(self.folder, self._keys)

    def opened(self) -> Store:
        """To write to. The first time, what no start has used for a month is removed. Raises OSError, StoreBusy."""
        with self._lock:
            if self._store is None:
                self._store = Store(self.folder, self._keys)
                for link in list(self._store.names()):
                    self._age(self._store, link)
            return self._store

    def has(self, namespace: str, name: str, digest: str) -> bool:
        return self.catalog.named(namespace, name) == digest

    def used(self, snapshot: Snapshot) -> None:
        """By a start, just now."""
        now = self._clock.wall()
        with contextlib.suppress(OSError):
            os.utime(snapshot.directory, (now, now))

    def remove(self, namespace: str, name: str) -> None:
        """If it is there. Raises OSError, StoreBusy."""
        if self.catalog.named(namespace, name):
            with contextlib.suppress(NotFound):
                self.opened().remove(namespace, name)

    def clear(self) -> bool:
        """Removes all of them. Returns whether there were any. Raises OSError, StoreBusy."""
        names = [(link.parent.name, link.name) for link in self.catalog.names()]
        for name in names:
            self.remove(*name)
        return bool(names)

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()

    def _age(self, store: Store, link: Path) -> None:
        with contextlib.suppress(OSError, NotFound):
            if self._clock.wall() - link.resolve().stat().st_mtime > _KEPT_SECONDS:
                store.remove(link.parent.name, link.name)


def of_use(manifest: Manifest) -> frozenset[str]:
    """The files of a snapshot that help a cold start where it does not fit; none: it has nothing of that kind."""
    found = {name for name in manifest.files if is_cache(name)}
    for record in published(manifest):
        prefix = beside_weights(record, "")
        found |= {layout_file(record), *(name for name in manifest.files if name.startswith(prefix))}
    return frozenset(found)
