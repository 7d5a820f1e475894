"""How much of this node's disk snapshots may take, and which of them go where another one comes.

Only what this node can fetch again goes: a snapshot whose name still stands for it in a store that it came from, or was put into. The
store is asked before anything is removed. So the only copy that is known never goes; nor does what its owner has pinned, or what somebody
uses: a replica, a standby, a restore, an upload. Other agents do not count as such a store: two of them could each count on the other.

What no object of a cluster asks for any more goes by the same care, when its controller says so: only what a controller had brought here.

One comer at a time is looked at. What others have still to bring counts as taken, and so does whatever else is on that disk.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from restore_agent.errors import AgentError
from restore_agent.sequences.parked_budget import Share
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.disk_usage import bytes_below
from restore_agent.snapshots.eviction import Candidate, evicted
from restore_agent.snapshots.pins import REMEDY
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unfit import Unfit
from restore_agent.transfer.source import Full

_SPARE = 64 << 20  # bytes of the disk that stay free
_FOLDERS = ("chunks", "snapshots", "fetched", "arriving", "unfit")  # that snapshots lie in, below the state folder
_LOG = logging.getLogger("zerowake.agent")


class NotOrphaned(AgentError):
    """Somebody brought it, pinned it or uses it; it stays."""

    reason = "not-orphaned"


class DiskBudget:
    """Of one node."""

    def __init__(
        self,
        store: Store,
        share: Share,
        needed: Callable[[str], bool],
        stands_elsewhere: Callable[[Snapshot], Awaitable[bool]],
        remove: Callable[[Snapshot], Awaitable[None]],
    ) -> None:
        """`share`: of the disk. `needed`: whether something on the node uses the snapshot of a digest. `stands_elsewhere`: asks the stores
        that are known. `remove`: off this node; raises NotFound: it is gone by now."""
        self._store = store
        self._share = share
        self._needed = needed
        self._stands_elsewhere = stands_elsewhere
        self._remove = remove
        self._lock = asyncio.Lock()
        self.unfit: Unfit | None = None  # goes before anything that fits

    async def make_room(
        self, wanted: str, size: int, digest: str = "", *, urgent: bool = True, coming: Callable[[], int] = lambda: 0
    ) -> None:
        """Room for `size` bytes of a snapshot that others are told as `wanted`, where they are not there yet. `digest`: the snapshot's, if
        that is known. `urgent`: somebody waits for it; else, unless it is pinned, only what is worth less goes for it. `coming`: bytes
        that others have still to bring.

        Raises Full: nothing has changed.
        """
        async with self._lock:
            budget, free = await asyncio.to_thread(self._left)
            needed = size + coming() - min(budget, free)
            if needed > 0 and self.unfit and await asyncio.to_thread(self.unfit.clear):
                budget, free = await asyncio.to_thread(self._left)
                needed = size + coming() - min(budget, free)
            if needed <= 0:
                return
            below = math.inf
            if not urgent and not self._store.pins.of(digest):
                if self._store.uses.wanted(digest):
                    await asyncio.to_thread(self._store.uses.keep, digest)
                below = self._store.uses.of(digest)
            of = "left of what snapshots may take (--disk)" if budget <= free else "free"
            for snapshot in await self._chosen(wanted, size, needed, below, of):
                _LOG.info("snapshot %s leaves the disk, of which %s needs %d MiB; it is in a store", snapshot, wanted, size >> 20)
                await self._remove(snapshot)

    async def remove_orphan(self, snapshot: Snapshot) -> None:
        """Off this node, as nobody asks for it any more. Raises NotOrphaned: it stays; NotFound: it is gone by now."""
        async with self._lock:
            if snapshot.digest not in self._store.managed:
                raise NotOrphaned(f"snapshot {snapshot} was brought to this node by hand, not by a controller; it stays")
            if self._store.pins.of(snapshot.digest):
                raise NotOrphaned(
                    f"snapshot {snapshot} is pinned on this node; it stays until somebody removes it (`zerowake snapshot rm`)"
                )
            if self._is_used(snapshot):
                raise NotOrphaned(f"snapshot {snapshot} is in use on this node; it stays until that has ended")
            await self._remove(snapshot)
        _LOG.info("snapshot %s leaves this node: no object of the cluster asks for it any more", snapshot)

    def _left(self) -> tuple[int, int]:
        """Of the budget, and of the disk."""
        stat = os.statvfs(self._store.state)
        total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize - _SPARE
        share = self._share(total)
        if share >= total:  # looking would take a while
            return total, free
        return share - sum(bytes_below(self._store.state / folder) for folder in _FOLDERS), free

    async def _chosen(self, wanted: str, size: int, needed: int, below: float, of: str) -> list[Snapshot]:
        """Those that go. `of`: what the room is lacking in, in words. Raises Full."""
        alone, shared = await asyncio.to_thread(self._store.removable_bytes)
        there = {each.digest: each for each in await asyncio.to_thread(self._store.list) if isinstance(each, Snapshot)}
        only_here = {digest for digest in there if not await asyncio.to_thread(self._store.origins.of, digest)}
        asked: set[str] = set()
        while True:
            # All come back at the same rate, whatever that is: their bytes stand for the seconds.
            candidates = [
                Candidate(
                    digest,
                    alone.get(digest, 0),
                    float(each.manifest.image_bytes + each.manifest.weights_bytes),
                    self._store.uses.of(digest),
                    held=digest in only_here or self._store.pins.of(digest) is not None or self._is_used(each),
                )
                for digest, each in there.items()
            ]
            going = evicted(candidates, needed, below, shared)
            if going is None:
                raise Full(self._why(wanted, size, needed, candidates, there, only_here, of))
            if asked.issuperset(going):
                return [there[digest] for digest in going]
            for digest in set(going) - asked:
                asked.add(digest)
                if not await self._stands_elsewhere(there[digest]):
                    only_here.add(digest)

    def _is_used(self, snapshot: Snapshot) -> bool:
        return self._needed(snapshot.digest) or snapshot.digest in self._store.chunks.leased

    def _why(
        self,
        wanted: str,
        size: int,
        needed: int,
        candidates: list[Candidate],
        there: Mapping[str, Snapshot],
        only_here: set[str],
        of: str,
    ) -> str:
        why = f"{self._store.state} has {max(0, size - needed) >> 20} MiB {of}, and {size >> 20} MiB of {wanted} have to come"
        only = "in no store that could be asked"
        pinned = {each.digest: there[each.digest] for each in candidates if self._store.pins.of(each.digest)}
        whys = Counter(
            "pinned" if each.digest in pinned else only if each.digest in only_here else "used" if each.held else "worth as much"
            for each in candidates
        )
        named = f" ({', '.join(sorted(map(str, pinned.values())))})"
        if whys:
            told = (f"{count} {kind}{named if kind == 'pinned' else ''}" for kind, count in whys.items())
            why += f"; of the snapshots there {', '.join(told)}"
        also = f", {REMEDY}" if pinned else ""
        return (
            f"{why}: remove one (`zerowake snapshot rm`), put what is only here into a store (`zerowake snapshot push`){also}, or make room"
        )
