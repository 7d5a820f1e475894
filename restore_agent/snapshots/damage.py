"""Whether what was published is still there as it was: looked at now and again, so that damage is heard of before a pod needs the bytes.

Each look costs one stat for each file. A file is hashed again only where the kernel says that it was written to, or is another one (its
inode, its size, or the time of its last change, which nobody can set back). Bytes that a disk loses by itself are found when they are
staged, where all of them are verified: what is suspected so is hashed again until it is whole. Rejected: hashing everything in turn, which
reads the disk for ever, and inotify, which tells of nothing on network disks and needs a watch for each folder of chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from restore_agent.snapshots.catalog import Catalog, Corrupt, Identity, NotFound, Snapshot, Unreadable, identity
from restore_agent.snapshots.keyring import Untrusted
from restore_agent.snapshots.unusable import Unusable


@dataclass(frozen=True)
class Found:
    """A snapshot whose bytes have changed. `why`: what is wrong with it; empty: nothing any more."""

    snapshot: Snapshot
    why: str


@dataclass
class _Known:
    """A snapshot as it was at the last look."""

    snapshot: Snapshot
    head: tuple[object, ...]  # Catalog.head
    files: dict[Path, Identity | None] = field(default_factory=dict)
    why: str = ""


class DamageWatch:
    """Use from one thread at a time: `look` blocks on the disk."""

    def __init__(self, store: Catalog) -> None:
        self._store = store
        self._known: dict[tuple[str, str], _Known | Unreadable] = {}

    def counts(self) -> dict[str, int]:
        """How many names there were at the last look, by what is behind them: a `whole` snapshot, one that is `corrupt` or `untrusted`, or
        another reason for which none can be read."""
        found = Counter({"whole": 0, Corrupt.reason: 0, Untrusted.reason: 0})
        for known in self._known.values():
            if isinstance(known, _Known):
                found[Corrupt.reason if known.why else "whole"] += 1
            else:
                found[known.why.reason] += 1
        return dict(found)

    def look(self, suspected: Mapping[str, str] | None = None) -> list[Found | Unreadable]:
        """What has changed since the last look: damaged, mended, or a name behind which nothing can be read any more. `suspected`: by
        digest, what others have found to be wrong with it."""
        news: list[Found | Unreadable] = []
        names, keys = {(link.parent.name, link.name) for link in self._store.names()}, self._store.keyring.identity
        for gone in self._known.keys() - names:
            del self._known[gone]
        for name in sorted(names):
            try:
                found = self._look_at(name, keys, suspected or {})
            except (NotFound, OSError):
                continue  # it was removed or replaced as it was looked at
            if found is not None:
                news.append(found)
        return news

    def _look_at(self, name: tuple[str, str], keys: object, suspected: Mapping[str, str]) -> Found | Unreadable | None:
        before = self._known.get(name)
        if isinstance(before, _Known) and not before.why:
            before.why = suspected.get(before.snapshot.digest, "")
        head = self._store.head(*name, keys)
        if not isinstance(before, _Known) or before.head != head:
            try:
                snapshot = self._store.again(*name, keys)
            except Unusable as error:
                unreadable = Unreadable(*name, error)
                self._known[name] = unreadable
                same = isinstance(before, Unreadable) and str(before.why) == str(error)
                return None if same else unreadable
            fresh = _Known(snapshot, head)
            if isinstance(before, _Known) and before.snapshot.digest == snapshot.digest:
                fresh.files, fresh.why = before.files, before.why
            self._known[name] = fresh
            news = self._compare(fresh)
            return news or (Found(snapshot, fresh.why) if isinstance(before, Unreadable) else None)
        return self._compare(before)

    def _compare(self, known: _Known) -> Found | None:
        snapshot, was = known.snapshot, known.why
        now = {path: identity(path) for path in known.files or self._paths(snapshot)}
        changed = [path for path, found in now.items() if found is None or known.files.get(path, found) != found]
        if was or changed:
            known.why = self._fault(snapshot, set(now) if was else set(changed))
        known.files = now
        return Found(snapshot, known.why) if known.why != was else None

    def _paths(self, snapshot: Snapshot) -> list[Path]:
        files = [snapshot.directory / name for name in snapshot.manifest.files]
        return files + [self._store.chunks.path(chunk.hash) for chunk in snapshot.chunks]

    def _fault(self, snapshot: Snapshot, suspects: set[Path]) -> str:
        try:
            for name, record in snapshot.manifest.files.items():
                if snapshot.directory / name in suspects:
                    self._store.read_file(snapshot, name, record)
            for chunk in snapshot.chunks:
                if self._store.chunks.path(chunk.hash) in suspects:
                    self._store.read_chunk(snapshot, chunk, memoryview(bytearray(chunk.size)))
        except Corrupt as error:
            return str(error)
        return ""
