"""What no name of a store needs, found and removed.

Needed is what the manifest of a name needs, what living uploads count on (leases.py), and what lost its name within the grace period: who
is fetching it shall end well. All else that is of our own making and older than the grace period goes: manifests first, so that what has a
manifest is whole, then chunks. Objects whose keys nobody of us makes are left alone.

Whatever counts for a name and cannot be read or verified ends the collection before anything is removed: what it needs cannot be told from
what nobody needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from restore_agent.errors import AgentError
from restore_agent.snapshots.catalog import Corrupt, NotFound
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.keyring import Keyring, Untrusted
from restore_agent.snapshots.manifest import Manifest, is_name
from restore_agent.transfer.contents import chunks_of
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.finding import any_manifest, manifest_of, record_of
from restore_agent.transfer.layout import CHUNKS, LEASES, NAMES, SNAPSHOTS, chunk_key
from restore_agent.transfer.leases import DEAD, Lease, collecting
from restore_agent.transfer.opened_store import OpenedStore
from restore_agent.transfer.source import Absent, Altered, Denied, Stored
from restore_agent.transfer.streams import STREAMS, Room, in_streams
from zerowake_shared.background import to_its_end
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

GRACE = 24 * 3600.0
_CHUNK = re.compile(rf"{CHUNKS}/([0-9a-f]{{2}})/\1[0-9a-f]{{62}}")
_SNAPSHOT = re.compile(rf"{SNAPSHOTS}/([0-9a-f]{{64}})/(manifest|signature)\.json")


class Busy(AgentError):
    """Another collection is at work on the store."""

    reason = "busy"


class Uncollectable(AgentError):
    """What a name of the store needs cannot be told."""

    reason = "corrupt"


@dataclass(slots=True)
class Heap:
    """Objects of one kind. `oldest`, `youngest`: seconds since they were written."""

    objects: int = 0
    size: int = 0  # bytes, as stored
    oldest: float = 0.0
    youngest: float = float("inf")

    def add(self, size: int, age: float) -> None:
        self.objects += 1
        self.size += size
        self.oldest, self.youngest = max(self.oldest, age), min(self.youngest, age)


@dataclass(slots=True)
class Collected:
    """What was removed, or would be; `needed` and `young` (nobody needs it, and it is within the grace period) stay."""

    names: int = 0
    needed: Heap = field(default_factory=Heap)
    young: Heap = field(default_factory=Heap)
    manifests: Heap = field(default_factory=Heap)  # and their signatures
    chunks: Heap = field(default_factory=Heap)
    unfinished: Heap = field(default_factory=Heap)  # what writers left that were ended


class Collector:
    """Of one store."""

    def __init__(self, keyring: Keyring, store: OpenedStore, grace: float = GRACE, clock: Clock = SYSTEM_CLOCK) -> None:
        """`grace`: seconds by the store's clock. It alone protects uploads of agents that know no leases."""
        self._keyring = keyring
        self._store = store
        self._grace = grace
        self._clock = clock

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """`dry_run`: nothing is removed.

        Raises:
            Busy. Uncollectable: something that counts for a name cannot be read or verified; nothing was removed.
            Denied, Unreachable, Full, Altered: the store; what was removed by then nobody needs.
        """
        async with collecting(self._store, removes=not dry_run, clock=self._clock) as lease:
            if not dry_run and (others := await lease.collections()):
                raise Busy(f"{self._store} is being collected by another ({others[0]}): wait for its end")
            needs = _Needs(self._keyring, self._store, self._grace)
            await needs.find(lease)
            done, manifests, chunks, unfinished = Collected(names=len(needs.names)), [], [], []
            for stored in sorted(needs.snapshots, key=lambda stored: stored.key):  # a manifest before its signature
                if self._sorted(stored, lease.now, needs.has_digest(stored), done, done.manifests):
                    manifests.append(stored.key)
            there = await self._store.names(chunk_key(chunk) for chunk in needs.chunks)
            async for stored in self._store.objects(CHUNKS):
                if _CHUNK.fullmatch(stored.key) and self._sorted(stored, lease.now, stored.key in there, done, done.chunks):
                    chunks.append(stored.key)
            async for stored in self._store.unfinished():
                if self._sorted(stored, lease.now, False, done, done.unfinished):
                    unfinished.append(stored.key)
            async for stored in self._store.objects(LEASES):
                if lease.now - stored.modified >= DEAD and self._sorted(stored, lease.now, False, done, done.unfinished):
                    unfinished.append(stored.key)
            if not dry_run:
                for keys in (manifests, chunks, unfinished):
                    await self._remove(keys, lease)
            return done

    def _sorted(self, stored: Stored, now: float, needed: bool, done: Collected, garbage: Heap) -> bool:
        """Whether it goes."""
        age = now - stored.modified
        goes = not needed and age >= self._grace
        (garbage if goes else done.needed if needed else done.young).add(stored.size, max(0.0, age))
        return goes

    async def _remove(self, keys: Iterable[str], lease: Lease) -> None:
        async def remove(key: str, room: Room) -> None:
            lease.check()
            await to_its_end(self._store.remove(key))  # nothing is removed once the lease is gone, also where the caller has left

        await in_streams(keys, STREAMS, remove)


class _Needs:
    """What may not be removed."""

    def __init__(self, keyring: Keyring, store: OpenedStore, grace: float) -> None:
        self._keyring = keyring
        self._store = store
        self._grace = grace
        self._fetch = Fetch(lambda chunk: [store])
        self._given: dict[tuple[str, str], float] = {}  # when each name's record was written
        self.names: dict[tuple[str, str], str] = {}  # digests
        self.digests: set[str] = set()
        self.chunks: set[str] = set()
        self.snapshots: list[Stored] = []

    def has_digest(self, stored: Stored) -> bool:
        return stored.key.split("/")[1] in self.digests

    async def find(self, lease: Lease) -> None:
        """Leases first: an upload that ends meanwhile has its name before its lease goes."""
        for claim in await lease.uploads():
            self.digests.add(claim.digest)
            self.chunks.update(claim.chunks)
        await self._find_names()
        for (namespace, name), digest in self.names.items():
            await self._need(namespace, name, digest)
        self.snapshots = [stored async for stored in self._store.objects(SNAPSHOTS) if _SNAPSHOT.fullmatch(stored.key)]
        await self._find_nameless(lease.now)

    async def _find_names(self) -> None:
        async for stored in self._store.objects(NAMES):
            parts = stored.key.removesuffix(".json").split("/")
            if len(parts) != 3 or not stored.key.endswith(".json") or not all(map(is_name, parts[1:])):
                continue
            _, namespace, name = parts
            try:
                record, _ = await record_of(self._store, self._keyring, namespace, name)
            except (Untrusted, Altered, NotFound) as error:
                raise self._unknown(namespace, name, error) from None
            self._given[namespace, name] = stored.modified
            if record.digest:
                self.names[namespace, name] = record.digest

    async def _need(self, namespace: str, name: str, digest: str) -> None:
        try:
            _, _, manifest = await manifest_of([self._store], self._keyring, namespace, name, digest)
            self._add(digest, await chunks_of(manifest, self._fetch))
        except (Untrusted, Altered, Absent, Corrupt, NotFound, Denied) as error:
            raise self._unknown(namespace, name, error) from None

    def _unknown(self, namespace: str, name: str, error: Exception) -> Uncollectable:
        return Uncollectable(
            f"nothing of {self._store} is removed: what {namespace}/{name} needs cannot be told ({error}); publish it again, trust its key "
            "here, or withdraw the name (`zerowake snapshot rm --store`)"
        )

    async def _find_nameless(self, now: float) -> None:
        """A manifest that has no name lost it when the next one of its name came, or when the name was withdrawn."""
        manifests = [stored for stored in self.snapshots if stored.key.endswith("/manifest.json")]
        written = {stored.key.split("/")[1]: stored.modified for stored in manifests}
        of_name: dict[tuple[str, str], list[float]] = {name: [written.get(digest, 0.0)] for name, digest in self.names.items()}
        nameless: dict[str, Manifest] = {}
        for digest in written.keys() - set(self.names.values()):
            try:
                manifest = nameless[digest] = await any_manifest(self._store, self._keyring, digest)
            except (Untrusted, Altered, Absent, Corrupt, Denied):
                continue  # it serves nobody
            of_name.setdefault((manifest.namespace, manifest.name), []).append(written[digest])
        for digest, manifest in nameless.items():
            name = manifest.namespace, manifest.name
            later = [at for at in of_name[name] if at > written[digest]]
            if now - max(written[digest], min(later) if later else self._given.get(name, 0.0)) < self._grace:
                try:
                    self._add(digest, await chunks_of(manifest, self._fetch))
                except (Altered, Absent, Corrupt, Denied):
                    continue

    def _add(self, digest: str, chunks: Iterable[Chunk]) -> None:
        self.digests.add(digest)
        self.chunks.update(chunk.hash for chunk in chunks)
