"""Leases: who has what. A lease belongs to one connection and ends with it at the latest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from gpumem.server.pool import Slab
from gpumem.server.regions import Region

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Owner:
    """The process at the other end of a connection, as the kernel says, and as it calls itself."""

    namespace: str  # "" for the operator
    pid: int
    label: str

    def __str__(self) -> str:
        return f"{self.label or 'process'} (pid {self.pid}{f', namespace {self.namespace}' if self.namespace else ''})"


@dataclass(eq=False)
class Lease:
    """Memory in use by one connection: a region that it reads or writes, scratch, or another's scratch."""

    owner: Owner
    device: str
    slabs: list[Slab]
    region: Region | None = None  # None: scratch
    writable: bool = False
    secret: bytes = b""  # of scratch: lets others of the namespace join it; empty: nobody
    joined: bool = False  # it is another lease's scratch
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def size(self) -> int:
        return sum(slab.size for slab in self.slabs)
