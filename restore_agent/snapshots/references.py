"""What the snapshots on a node's disk are made of: which chunks, and which regions of weights, each of them needs.

What a manifest names never changes under its digest. So a manifest is read once, and again only where its file is another one or was
written to: a store that looks at thousands of snapshots at each change of one opens none of the others. Users are counted as snapshots come
and go. Rejected: what Catalog keeps by name, which counts by who signed it: what is not trusted today may be so tomorrow, and is needed
until then.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from restore_agent.snapshots.catalog import MANIFEST, Identity, identity
from restore_agent.snapshots.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one snapshot. chunks: their bytes, by hash."""

    chunks: Mapping[str, int]
    regions: frozenset[str]


class References:
    """Of one state folder. `look` blocks on the disk, and is nobody's but the one's who holds the store."""

    def __init__(self, state: Path, read: Callable[[str], Manifest]) -> None:
        """`read`: a snapshot's manifest, by digest, whoever signed it; raises Corrupt."""
        self._folder = f"{state}/snapshots"
        self._read = read
        self._seen: dict[str, tuple[Identity | None, Needs]] = {}
        self.chunks: Counter[str] = Counter()  # hash → snapshots that need it; of none there is none
        self.regions: Counter[str] = Counter()

    def look(self, digests: Collection[str]) -> None:
        """From now on all is said of these snapshots, which are on the disk. Raises Corrupt: one of them cannot be read."""
        for digest in self._seen.keys() - set(digests):
            self._forget(digest)
        for digest in digests:
            now = identity(f"{self._folder}/{digest}/{MANIFEST}")
            seen = self._seen.get(digest)
            if seen is not None and seen[0] == now:
                continue
            if seen is not None:
                self._forget(digest)
            manifest = self._read(digest)
            needs = Needs({chunk.hash: chunk.size for chunk in manifest.chunks}, frozenset(each.region for each in manifest.weights))
            self._seen[digest] = now, needs
            self.chunks.update(needs.chunks.keys())
            self.regions.update(needs.regions)

    def regions_of(self, digest: str) -> frozenset[str]:
        return self._seen[digest][1].regions

    def chunk_bytes(self, kept: Container[str]) -> tuple[dict[str, int], dict[frozenset[str], int]]:
        """Digest → bytes of chunks that it alone needs; and of those that several need: bytes by all who do. Not of those that are `kept`
        for others."""
        alone: dict[str, int] = dict.fromkeys(self._seen, 0)
        users: defaultdict[str, list[str]] = defaultdict(list)
        sizes: dict[str, int] = {}
        for digest, (_, needs) in self._seen.items():
            for chunk, size in needs.chunks.items():
                if chunk in kept:
                    continue
                if self.chunks[chunk] == 1:
                    alone[digest] += size
                else:
                    users[chunk].append(digest)
                    sizes[chunk] = size
        shared: Counter[frozenset[str]] = Counter()
        for chunk, digests in users.items():
            shared[frozenset(digests)] += sizes[chunk]
        return alone, dict(shared)

    def _forget(self, digest: str) -> None:
        _, needs = self._seen.pop(digest)
        for counts, names in ((self.chunks, needs.chunks), (self.regions, needs.regions)):
            counts.subtract(names.keys() if isinstance(names, Mapping) else names)
            for name in names:
                if not counts[name]:
                    del counts[name]
