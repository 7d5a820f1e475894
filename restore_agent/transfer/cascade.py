"""One snapshot for many nodes, read once from where it comes from.

All agents that want a snapshot share its chunks out among each other (rendezvous.py). Each reads its own from the roots: agents that have
the snapshot, then the origin (a bucket, a folder). The others' it takes from those whose they are, who serve each chunk from the moment
they have it. Both go on at the same time, in the order of the manifest, so that all agents are at about the same place.

Where the one whose chunk it is fails, the next in the chunk's rank reads it from the roots, and the rest wait for that one: else a node
that dies would have all others read its share. Nobody waits for one that is behind it in the rank, so no two wait for each other. Who comes
later than the others finds his share taken: the next two in the rank are asked first, without waiting.

Rejected: telling each other what one has (as BitTorrent does), which is for members that come from anywhere and stay for long; and a tree
of nodes, in which each can be as fast as the one above it only.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.fetch import Fetch, Patience
from restore_agent.transfer.rendezvous import ranked
from restore_agent.transfer.source import Source, TransferError
from restore_agent.transfer.streams import STREAMS
from zerowake_shared.background import first_error

_AHEAD = 3  # members that are waited for before the roots are read
_BEHIND = 2  # members that are asked whether they have read a chunk of this one's share
_FEWEST_STREAMS = 4  # from the roots: with those of all other members it is many
_FLOOR = 1 << 20  # bytes a second of one stream, where another can be had


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds. Each is longer than the one before: who reads from a slow root has left it before those who wait for him leave him."""

    root: float = 5.0  # without a byte of a root
    arrival: float = 8.0  # for a member to have a chunk
    member: float = 10.0  # without a byte of a member, which says so if it only waits itself


class Cascade:
    """Where this node takes each chunk of one snapshot from."""

    def __init__(
        self,
        here: str,
        members: Mapping[str, Callable[[float], Source]],
        holders: Mapping[str, Source],
        origins: Sequence[Source],
        waits: Waits = Waits(),
        moved: Callable[[int], None] = lambda count: None,
        left: Callable[[Source, TransferError], None] = lambda source, error: None,
    ) -> None:
        """`here`: this node's name. `members`: the other nodes that fetch the snapshot too, by name, each as a source that is waited for
        so many seconds. `holders`: those that have it. `origins`: buckets and folders that do, the nearest first. `moved`,
        `left`: as Fetch has them.
        """
        self._here = here
        self._members = [here, *members]
        self._waited_for = {name: peer(waits.arrival) for name, peer in members.items()}
        self._asked = {name: peer(0.0) for name, peer in members.items()}
        self._holders = holders
        self._origins = origins
        self._waits = waits
        self._fetch = functools.partial(Fetch, self.sources, moved=moved, left=left)

    def reads(self, chunk: Chunk) -> bool:
        """The chunk is of this node's share."""
        return ranked(chunk.hash, self._members)[0] == self._here

    def sources(self, chunk: Chunk) -> list[Source]:
        """Of a chunk, the best first."""
        ranks = ranked(chunk.hash, self._members)
        place = ranks.index(self._here)
        roots: list[Source] = [*(self._holders[name] for name in ranked(chunk.hash, self._holders)), *self._origins]
        ahead = [self._waited_for[name] for name in ranks[:place][:_AHEAD]]
        behind = ranks[place + 1 :]
        early = [self._asked[name] for name in behind[:_BEHIND]] if roots and not place else []
        # Who was told of no root gets everything from the others, if he gets it at all.
        asked = self._asked if roots else self._waited_for
        late = [asked[name] for name in ranks if name != self._here]
        return [*ahead, *early, *roots, *(source for source in late if source not in (*ahead, *early))]

    async def bring_all(self, chunks: Iterable[Chunk], keep: Callable[[Chunk, memoryview], None], arrived: Callable[[Chunk], None]) -> None:
        """As Fetch.bring_all, which says what it raises."""
        own: list[Chunk] = []
        others: list[Chunk] = []
        for chunk in chunks:
            (own if self.reads(chunk) else others).append(chunk)
        streams = max(_FEWEST_STREAMS, STREAMS // len(self._members))
        from_roots = self._fetch(streams=streams, patience=Patience(stall=self._waits.root, floor=_FLOOR))
        from_members = self._fetch(patience=Patience(stall=self._waits.member, floor=_FLOOR))
        with first_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(from_roots.bring_all(own, keep, arrived), name="this node's share")
                if others:
                    group.create_task(from_members.bring_all(others, keep, arrived), name="the others' shares")
