"""The arena: one piece of host memory, pinned once, through which bytes come from files and in which chunks stay, by content.

The server keeps the books, here; the filler has it mapped and moves the bytes. A chunk in it was verified on its way in and nobody but
the filler can write it, so it is not verified again. It goes when its room is wanted and it has been used least recently, unless it is
held: by a fill that is under way, or by a set of chunks that is pinned.

Chunks belong to the namespace that proved to have them, or to all when the operator brought them: a tenant who only knows a chunk's hash
does not get its bytes out of the arena.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections import OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from gpumem.filler.files import BLOCK
from gpumem.hardware import host

Key: TypeAlias = tuple[str, bytes]  # namespace ("" for all), BLAKE3


@dataclass(eq=False)
class Place:
    """Where a chunk lies in the arena, or is to lie. All in bytes; offsets from the arena's start."""

    start: int  # of its first block
    length: int  # of its blocks
    offset: int  # of the chunk's first byte
    size: int  # of the chunk
    holds: int = 0  # while there are any, it is not evicted
    key: Key | None = None  # None: not verified yet


@dataclass(eq=False)
class ChunkSet:
    """The chunks of a layout that somebody wanted in memory."""

    keys: list[Key]
    size: int  # bytes of the chunks
    pinned: bool
    held: list[Place]


class Arena:
    """The books of the arena: which chunk lies where, who needs it, and what is free."""

    def __init__(self, size: int, huge_pages: host.HugePagesOn = contextlib.nullcontext) -> None:
        """An arena of `size` bytes, a multiple of 2 MiB; its memory comes with `open`. `huge_pages`: as `HostMemory` takes it."""
        self.size = size
        self._huge_pages = huge_pages
        self.fd = -1
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (start, length), in order of start, never side by side
        self._places: OrderedDict[Key, Place] = OrderedDict()  # least recently used first
        self.sets: dict[Key, ChunkSet] = {}

    def open(self) -> None:
        """Takes the memory. Slow: call it in a thread. Raises DeviceFull."""
        if self.size:
            self.fd = os.memfd_create(f"{host.NAME}-arena", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, self.size)
            with self._huge_pages():
                host.populate(self.fd, self.size, threads=min(16, os.cpu_count() or 1))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def used(self) -> int:
        return self.size - sum(length for _, length in self._free)

    @property
    def idle(self) -> int:
        """Bytes of those used whose chunks go when their room is wanted."""
        return sum(place.length for place in self._places.values() if not place.holds)

    def find(self, namespace: str, chunk: bytes) -> Place | None:
        """The chunk, if it is there for this namespace."""
        for key in ((namespace, chunk), ("", chunk)):
            place = self._places.get(key)
            if place is not None:
                self._places.move_to_end(key)
                return place
        return None

    def wanted(self) -> frozenset[bytes]:
        """The chunks that any set has, by hash."""
        return frozenset(chunk for each in self.sets.values() for _, chunk in each.keys)

    def spare(self, kept: Container[bytes]) -> int:
        """Bytes that are free, or have chunks which nobody holds and are not among those that are kept."""
        return self.size - self.used + sum(place.length for place in self._places.values() if _may_go(place, kept))

    def make_room(self, size: int, alignment: int, kept: Container[bytes] = ()) -> Place | None:
        """Room for a chunk whose first byte lies `alignment` bytes behind the start of a block; held once. None: all is held, or kept."""
        alignment %= BLOCK
        length = -(-(alignment + size) // BLOCK) * BLOCK
        start = self._cut(length)
        while start is None:
            victim = next((place for place in self._places.values() if _may_go(place, kept)), None)
            if victim is None:
                return None
            self._drop(victim)
            start = self._cut(length)
        return Place(start, length, start + alignment, size, holds=1)

    def publish(self, place: Place, namespace: str, chunk: bytes) -> None:
        """The chunk in this place is verified: from now on it can be found."""
        key = (namespace, chunk)
        if key not in self._places:
            place.key = key
            self._places[key] = place

    def retain(self, place: Place) -> None:
        """Keeps a place from being evicted until `release`. Each call needs one."""
        place.holds += 1

    def release(self, place: Place) -> None:
        """Ends one hold. A place that never became a chunk is free again after its last."""
        place.holds -= 1
        if not place.holds and place.key is None:
            self._give(place)

    def add_set(self, name: Key, wanted: ChunkSet) -> None:
        """Remembers a set under a name, instead of the one of that name; a pinned one keeps its chunks from being evicted."""
        self.remove_set(name)
        self.sets[name] = wanted
        if wanted.pinned:
            for namespace, chunk in wanted.keys:
                place = self.find(namespace, chunk)
                if place is not None:
                    self.retain(place)
                    wanted.held.append(place)

    def remove_set(self, name: Key) -> bool:
        """Unpins a set and forgets it; its chunks go when their room is wanted."""
        found = self.sets.pop(name, None)
        if found is None:
            return False
        for place in found.held:
            self.release(place)
        return True

    def present(self, keys: Iterable[Key]) -> int:
        """Bytes of these chunks that are there."""
        places = (self._places.get(key) or self._places.get(("", key[1])) for key in keys)
        return sum(place.size for place in places if place is not None)

    def _cut(self, length: int) -> int | None:
        for index, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[index : index + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def _drop(self, place: Place) -> None:
        assert place.key is not None
        del self._places[place.key]
        place.key = None
        self._give(place)

    def _give(self, place: Place) -> None:
        start, length = place.start, place.length
        index = bisect.bisect(self._free, (start, length))
        if index < len(self._free) and self._free[index][0] == start + length:
            length += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            start, before = self._free.pop(index - 1)
            length += before
            index -= 1
        self._free.insert(index, (start, length))


def _may_go(place: Place, kept: Container[bytes]) -> bool:
    return not place.holds and (place.key is None or place.key[1] not in kept)
