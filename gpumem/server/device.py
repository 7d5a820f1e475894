"""One device: its pool, the regions on it, and who has a lease of what. Decides who gets memory and what goes for it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

from gpumem.hardware.memory import Memory, MemoryFailed, StillWritable
from gpumem.server.leases import Lease, Owner
from gpumem.server.pool import Pool, Short, Slab
from gpumem.server.regions import Chunks, Region, State
from gpumem.wire.errors import Exists, Forbidden, GpumemError, NotFound, NotSealed, OutOfMemory, StillMapped

_RETURN_SECONDS = 2.0  # how long a request waits for memory that was given back to be free again


class Device:
    """One device's books, kept by the server. All calls come from its event loop."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.pool = Pool(memory)
        self.regions: dict[tuple[str, bytes], Region] = {}  # by namespace and id
        self.leases: set[Lease] = set()
        self._shared: dict[tuple[str, bytes], Lease] = {}  # scratch that can be joined, by namespace and secret
        self.quotas: dict[str, int] = {}
        self._asked: Counter[str] = Counter()  # bytes being allocated, by namespace: they count against its quota
        self._made: set[tuple[str, bytes]] = set()  # keys of regions whose memory is being allocated
        self._changed = asyncio.Event()

    @property
    def identity(self) -> str:
        return self.memory.identity

    def used_by(self, namespace: str) -> int:
        """Bytes of this device that count against the namespace's quota."""
        regions = sum(region.size for region in self.regions.values() if region.namespace == namespace)
        scratch = sum(lease.size for lease in self.scratch() if lease.owner.namespace == namespace)
        return regions + scratch + self._asked[namespace]

    async def allocate(self, size: int, namespace: str, *, spare: bool = False) -> list[Slab]:
        """Memory of at least `size` bytes, evicting what is not in use, least recently used first; `spare`: evicting nothing.

        Raises:
            OutOfMemory: of the quota or of the device; the message says what holds it.
            GpumemError: the device refuses.
        """
        size = self.pool.rounded(size)
        quota = self.quotas.get(namespace, 0)
        if quota and self.used_by(namespace) + size > quota:
            if not spare:
                self._evict_for(self.used_by(namespace) + size - quota, self._evictable(namespace))
            if self.used_by(namespace) + size > quota:
                raise OutOfMemory(
                    f"{size} bytes more are beyond the quota of namespace {namespace} on {self.identity} ({quota} bytes, "
                    f"{self.used_by(namespace)} used): evict a region of its, end a process that has one, or raise the quota"
                )
        self._asked[namespace] += size
        try:
            return await self._take(size, spare=spare)
        except MemoryFailed as error:
            raise OutOfMemory(f"{self.identity} gives no memory: {error}") from error
        finally:
            self._asked[namespace] -= size

    async def _take(self, size: int, *, spare: bool) -> list[Slab]:
        deadline = time.monotonic() + _RETURN_SECONDS
        while True:
            try:
                return await self.pool.acquire(size)
            except Short as short:
                if not spare and self._evict_for(short.missing, self._evictable(None)):
                    continue
                # What a process gave back by dying is not free at once.
                if spare or self.pool.owed < short.missing or time.monotonic() > deadline:
                    raise OutOfMemory(
                        f"{size} bytes wanted on {self.identity}, where {self.pool.free} of {self.pool.wanted} are free"
                        f"{self._holders()}: end one of these, evict or unpin a region, or hold more (gpumem reserve)"
                    ) from None
            await asyncio.sleep(0.02)

    def _evictable(self, namespace: str | None) -> list[Region]:
        """Regions that may go, first the one that goes first."""
        found = [
            region
            for region in self.regions.values()
            if not region.readers and not region.pinned and region.state is not State.FILLING and namespace in (None, region.namespace)
        ]
        return sorted(found, key=lambda region: (region.state is State.SEALED, region.used))

    def _evict_for(self, missing: int, candidates: list[Region]) -> bool:
        """Evicts as many as it takes to free `missing` bytes; none, if all of them would not do."""
        if sum(region.size for region in candidates) < missing:
            return False
        for region in candidates:
            if missing <= 0:
                break
            missing -= region.size
            self.remove(region)
        return True

    def _holders(self) -> str:
        """The largest of what is in use, in words."""
        parts = [(lease.size, f"scratch of {lease.owner}") for lease in self.scratch()]
        for region in self.regions.values():
            owners = ", ".join(sorted(str(lease.owner) for lease in self.leases if lease.region is region)[:3])
            why = f"used by {owners}" if owners else "pinned" if region.pinned else region.state.value
            parts.append((region.size, f"{region} ({why})"))
        if self.pool.owed:
            parts.append((self.pool.owed, "given back but kept by a process, or taken by others on the device"))
        words = [f"{size} bytes: {what}" for size, what in sorted(parts, reverse=True)[:5]]
        return f"; held: {'; '.join(words)}" if words else ""

    # Regions

    def find(self, namespace: str, region_id: bytes, capability: bytes) -> Region | None:
        """The region with this id that the caller may use. That it is there is not told to anybody else."""
        own = self.regions.get((namespace, region_id))
        candidates = [own] if own is not None else []
        candidates += [region for region in self.regions.values() if region.id == region_id and region is not own]
        return next((region for region in candidates if region.opens_to(namespace, capability)), None)

    async def wait_sealed(self, namespace: str, region_id: bytes, capability: bytes, seconds: float) -> Region:
        """Waits until it is sealed.

        Raises:
            NotFound, NotSealed: it was not within that time.
        """
        deadline = time.monotonic() + seconds
        while True:
            changed = self._changed
            region = self.find(namespace, region_id, capability)
            if region is not None and region.state is State.SEALED:
                return region
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await changed.wait()
            except TimeoutError:
                break
        name = f"region {region_id.hex()[:12]} on {self.identity}"
        if region is None:
            raise NotFound(
                f"{name}: not there for this caller after {seconds:.1f} s; fill it first, or show the capability of a private one"
            )
        raise NotSealed(
            f"{name}: not filled after {seconds:.1f} s ({region.filled_bytes} of {region.chunks.size} bytes); attach with a longer wait"
        )

    async def create(
        self,
        region_id: bytes,
        layout: bytes,
        chunks: Chunks,
        owner: Owner,
        *,
        private: bool,
        pinned: bool,
        written: bool = False,
        spare: bool = False,
    ) -> Region:
        """A new region, to be filled, or `written` by its owner; `spare`: as `allocate` has it.

        Raises OutOfMemory; NotSealed: somebody else is making it.
        """
        key = (owner.namespace, region_id)
        if key in self.regions or key in self._made:
            raise NotSealed(f"region {region_id.hex()[:12]} on {self.identity} has a writer already: attach to it, with a wait")
        self._made.add(key)
        try:
            slabs = await self.allocate(chunks.size, owner.namespace, spare=spare)
            region = Region(region_id, owner.namespace, self.identity, layout, chunks, slabs, private, pinned, written)
            self.regions[key] = region
        finally:
            self._made.discard(key)
            self.changed()
        return region

    def remove(self, region: Region) -> None:
        """Takes a region off the device, whoever uses it. Twice does nothing."""
        if self.regions.pop((region.namespace, region.id), None) is region:
            self.pool.retire(region.slabs)
            region.slabs = []
            self.changed()

    def evict(self, region: Region) -> None:
        """Raises Forbidden while it is in use."""
        if region.readers or region.state is State.FILLING:
            raise Forbidden(f"{region} on {self.identity} is in use{self._holders()}: end its users first")
        self.remove(region)

    def seal(self, region: Region) -> None:
        """Raises StillMapped where somebody can still write."""
        try:
            for slab in region.slabs:
                self.memory.seal(slab.fd)
        except StillWritable as error:
            raise StillMapped(f"{region} cannot be sealed: {error}; unmap it everywhere and seal again") from error
        except MemoryFailed as error:
            raise GpumemError(f"{region} cannot be sealed: {error}") from error
        region.state = State.SEALED
        region.used = time.monotonic()
        self.changed()
        self._shrink()

    def pause(self, region: Region) -> None:
        """Its fill has ended before it was whole. The next goes on with it, unless its memory is wanted before."""
        region.state = State.PAUSED
        self.changed()
        self._shrink()

    def changed(self) -> None:
        """Wakes everybody who waits for a region."""
        self._changed.set()
        self._changed = asyncio.Event()

    def is_busy(self, namespace: str, region_id: bytes) -> bool:
        """Whether somebody makes or fills this region."""
        region = self.regions.get((namespace, region_id))
        return (namespace, region_id) in self._made or (region is not None and region.state is State.FILLING)

    async def while_busy(self, namespace: str, region_id: bytes) -> None:
        """Waits until nobody makes or fills this region."""
        while self.is_busy(namespace, region_id):
            await self._changed.wait()

    # Leases

    def lend(self, region: Region, owner: Owner, writable: bool = False) -> Lease:
        """A lease of a region: of a sealed one to read, of a new one to write."""
        lease = Lease(owner, self.identity, region.slabs, region, writable)
        region.readers += 1
        region.used = time.monotonic()
        self.leases.add(lease)
        return lease

    async def lend_scratch(self, size: int, owner: Owner, secret: bytes = b"") -> Lease:
        """A lease of memory that is zeros and nobody else's, but for those of the namespace who show the secret.

        Raises:
            OutOfMemory.
            Exists: the secret is another's already.
        """
        lease = Lease(owner, self.identity, await self.allocate(size, owner.namespace), writable=True, secret=secret)
        if secret and self._shared.setdefault((owner.namespace, secret), lease) is not lease:
            self.pool.retire(lease.slabs)
            raise Exists(f"a scratch of {self._shared[owner.namespace, secret].owner} has that secret already: make a new one each time")
        self.leases.add(lease)
        self.changed()
        return lease

    async def join(self, secret: bytes, owner: Owner, seconds: float) -> Lease:
        """A lease of another's scratch, once it is there. Raises NotFound: it was not within that time."""
        deadline = time.monotonic() + seconds
        while (found := self._shared.get((owner.namespace, secret))) is None:
            changed = self._changed
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await changed.wait()
            except TimeoutError:
                raise NotFound(
                    f"no scratch on {self.identity} has that secret after {seconds:.1f} s: whoever is to lend it is not there, or has ended"
                ) from None
        lease = Lease(owner, self.identity, found.slabs, writable=True, joined=True)
        self.leases.add(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """Ends a lease. What its owner could write and never sealed is gone."""
        if lease not in self.leases:
            return
        self.leases.remove(lease)
        if lease.joined:
            return
        if lease.region is None:
            self._shared.pop((lease.owner.namespace, lease.secret), None)
            self.pool.retire(lease.slabs)
            self.changed()
            return
        if lease.writable:
            self.remove(lease.region)
        self.let_go(lease.region)

    def let_go(self, region: Region) -> None:
        """One reader of it has ended."""
        region.readers -= 1
        region.used = time.monotonic()
        self._shrink()

    async def resize(self, wanted: int) -> int:
        """Holds `wanted` bytes from now on. Evicts regions that nobody uses, pinned ones last; those in use as soon as nobody does.

        Returns the bytes held now.
        """
        self._shrink_to(wanted)
        await self.pool.resize(wanted)
        return self.pool.free + self.pool.lent

    def _shrink(self) -> None:
        self._shrink_to(self.pool.wanted)

    def _shrink_to(self, wanted: int) -> None:
        over = self.pool.lent - wanted
        for region in [*self._evictable(None), *(r for r in self.regions.values() if r.pinned and not r.readers)]:
            if over <= 0:
                break
            if region.state is not State.FILLING and region.slabs:
                over -= region.size
                self.remove(region)

    def scratch(self) -> Iterator[Lease]:
        return (lease for lease in self.leases if lease.region is None and not lease.joined)
