"""The order in which held requests are served: priority first, then fair between tenants, then first come first served.

Within a priority class tenants take turns, one request each (round robin, the scheme of Nagle's "On Packet Switches With Infinite
Storage"), so a tenant with 1,000 requests delays another's single one by one request, not by 1,000. Joining, leaving and being served are
O(1): a tenant's line and the ring of tenants are ordered dicts used as linked lists. Rejected: one heap by time (unfair), weights (nobody
asked for them), ageing between classes (a class is a promise: low waits while high has work).
"""

from __future__ import annotations

from collections import OrderedDict
from enum import IntEnum
from typing import Generic, TypeVar

T = TypeVar("T")


class Priority(IntEnum):
    """Classes of requests, the first one served first. A class waits while one before it has any."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class FairQueue(Generic[T]):
    """Items of one model; an item is in it at most once."""

    __slots__ = ("_classes", "_size")

    def __init__(self) -> None:
        # For every class a ring of tenants, next one first; for every tenant its line, first one first.
        self._classes: tuple[OrderedDict[str, OrderedDict[T, None]], ...] = tuple(OrderedDict() for _ in Priority)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: T, tenant: str, priority: Priority, *, first: bool = False) -> None:
        """Joins the tenant's line at its end; `first`: is served next in its class, for what has waited before."""
        ring = self._classes[priority]
        line = ring.get(tenant)
        if line is None:
            line = ring[tenant] = OrderedDict()
        line[item] = None
        if first:
            line.move_to_end(item, last=False)
            ring.move_to_end(tenant, last=False)
        self._size += 1

    def pop(self) -> T:
        """The next item to serve. Raises: IndexError if the queue is empty."""
        for ring in self._classes:
            if ring:
                tenant, line = ring.popitem(last=False)
                item, _ = line.popitem(last=False)
                if line:
                    ring[tenant] = line  # behind the other tenants
                self._size -= 1
                return item
        raise IndexError("the queue is empty")

    def remove(self, item: T, tenant: str, priority: Priority) -> None:
        """Leaves the line. Raises: KeyError if it is not in it."""
        ring = self._classes[priority]
        line = ring[tenant]
        del line[item]
        if not line:
            del ring[tenant]
        self._size -= 1
