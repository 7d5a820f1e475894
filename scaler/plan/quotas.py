"""How much of all nodes' memory the snapshots of one namespace may take while they wait for requests. Pure.

An image in memory takes its bytes; a standby, and what is parked, takes them once more, for its processes. What is on its way up counts. At
its quota none of a namespace's snapshots go up ahead of a request, whether their owner or the forecast wants them there. A request's own
way is never barred, and what it brought up counts from then on. Nothing is taken down: what stands when a quota is lowered goes as nodes'
budgets, and owners, take it down.
Rejected: a share of each node, which a namespace whose models are few and large could not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import Action, Stage
from scaler.plan.rungs import Rung
from scaler.plan.world import Residency, World

EVERY_OTHER = "*"  # in the place of a namespace: each that is not named


class Room:
    """What namespaces may still take, in one look at the world. Only where there are quotas anything is counted."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._given: dict[str, int] = {}

    def left(self, namespace: str) -> float:
        """Bytes; infinite: it has no quota."""
        if (quota := self._quota(namespace)) is None:
            return math.inf
        return quota - self._taken.get(namespace, 0) - self._given.get(namespace, 0)

    def give(self, namespace: str, size: int) -> None:
        """Counts so many bytes more as taken."""
        self._given[namespace] = self._given.get(namespace, 0) + size

    def why_full(self, namespace: str) -> str:
        """In words, of one that has a quota."""
        mebibytes = (self._quota(namespace) or 0) >> 20
        return (
            f"all nodes' memory together may hold {mebibytes} MiB of namespace {namespace} ahead of requests, and has no room for more: "
            "have others of its snapshots wait lower (spec.stage), or its quota raised (memory_quotas)"
        )

    def why_no_higher(self, name: SnapshotName, there: Residency) -> str:
        """Why it goes no rung higher ahead of a request; empty: its namespace's quota has room."""
        more = _bytes_on(Rung(min(there.rung + 1, Rung.PARKED)), there) - _bytes_on(there.rung, there)
        return self.why_full(name.namespace) if more > self.left(name.namespace) else ""

    def _quota(self, namespace: str) -> int | None:
        return self._world.quotas.get(namespace, self._world.quotas.get(EVERY_OTHER))

    @cached_property
    def _taken(self) -> dict[str, int]:
        going_up = {(each.node, each.snapshot): each.rung for each in self._world.under_way if isinstance(each, Stage)}
        found: dict[str, int] = {}
        for node in self._world.nodes:
            for name, there in node.residencies.items():
                rung = max(there.rung, going_up.get((node.address, name), Rung.ABSENT))
                if rung >= Rung.MEMORY:
                    found[name.namespace] = found.get(name.namespace, 0) + _bytes_on(rung, there)
        return found


def within(world: World, actions: Sequence[Action]) -> tuple[list[Action], dict[Stage, str]]:
    """Those that are done, and those that would take a namespace beyond its quota, with why. What a request waits for is done."""
    if not world.quotas:
        return list(actions), {}
    room, nodes = Room(world), {node.address: node for node in world.nodes}
    done: list[Action] = []
    barred: dict[Stage, str] = {}
    for action in actions:
        if isinstance(action, Stage) and action.rung >= Rung.MEMORY and (there := nodes[action.node].residencies.get(action.snapshot)):
            if not action.urgent and (why := room.why_no_higher(action.snapshot, there)):
                barred[action] = why
                continue
            room.give(action.snapshot.namespace, _bytes_on(action.rung, there) - _bytes_on(there.rung, there))
        done.append(action)
    return done, barred


def _bytes_on(rung: Rung, there: Residency) -> int:
    """What a snapshot takes of its node's memory on that rung."""
    return there.image_bytes * (2 if rung >= Rung.STANDBY else rung >= Rung.MEMORY)
