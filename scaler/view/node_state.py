"""A node as it is shown, from what its agent says, and who of all nodes has which snapshot."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from scaler.books.snapshot_name import SnapshotName
from scaler.plan import world
from scaler.plan.estimate import seconds_to_serve, total_bytes
from scaler.plan.rungs import Rung, WeightsRung
from scaler.view.state import Copy, Gpu, Memory, Move, Node, Origin, Presence, Rates, RungUse

_AT_A_TIME = 64  # copies, before requests may have their turn
_AS = {Rung.DISK: "on disk", Rung.MEMORY: "in memory", Rung.STANDBY: "a standby", Rung.PARKED: "parked", Rung.ABSENT: "absent"}
_WEIGHTS_ON = {WeightsRung.ABSENT: "disk", WeightsRung.DISK: "disk", WeightsRung.MEMORY: "arena", WeightsRung.GPU: "gpu"}
Refusals = Mapping[tuple[str, str, Rung], str]  # (node's address, digest, rung) → why its agent did not take the snapshot there


@dataclass(slots=True)
class Standing:
    """Of one snapshot on all nodes: how many have it, the highest rung, the seconds of the node that serves it soonest (None: none
    could), and in words why it goes no higher, and why it cannot be restored."""

    nodes: int = 0
    best: Rung = Rung.ABSENT
    soonest: float | None = None
    refused: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


class Copies:
    """Who has which snapshot, put together while nodes are gone through. refusals: of all agents."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._standings: dict[SnapshotName, Standing] = {}
        self._called: dict[str, SnapshotName] = {}
        self._having: set[tuple[str, SnapshotName]] = set()

    def add(self, address: str, snapshot: SnapshotName, there: world.Residency, seconds: float | None) -> None:
        """The node of that address has it, and would serve it within so many seconds; None: it could not."""
        standing = self._standings.get(snapshot)
        if standing is None:
            standing = self._standings[snapshot] = Standing()
        standing.nodes += 1
        standing.best = max(standing.best, there.rung)
        if seconds is not None:
            standing.soonest = seconds if standing.soonest is None else min(standing.soonest, seconds)
        if there.unusable:
            standing.unusable.append(there.unusable)
        if self._refusals and there.rung < max(Rung):
            above = Rung(there.rung + 1)
            if why := self._refusals.get((address, there.digest, above)):
                standing.refused.append(f"not {_AS[above]}: {why}")
        self._called[there.digest] = snapshot
        self._having.add((address, snapshot))

    def complete(self) -> None:
        """All nodes were gone through: takes in what agents were asked to fetch and could not."""
        for (address, digest, rung), why in self._refusals.items():
            snapshot = self._called.get(digest)
            if rung is Rung.DISK and snapshot is not None and (address, snapshot) not in self._having:
                self._standings[snapshot].refused.append(f"not fetched: {why}")

    def of(self, snapshot: SnapshotName | None) -> Standing:
        return self._standings.get(snapshot, _NOWHERE) if snapshot is not None else _NOWHERE

    def called(self, digest: str) -> SnapshotName | None:
        """The name of the snapshot with that digest; None: no node has it."""
        return self._called.get(digest)


_NOWHERE = Standing()


class NodeStates:
    """Nodes as they were shown last: one of which nothing was heard since is not gone through again, which is most of the work."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[world.Node, Node]] = {}

    async def of(self, nodes: Iterable[world.Node], copies: Copies, pace: Callable[[], Awaitable[None]]) -> tuple[Node, ...]:
        """In the order of their names. What they have goes into `copies`. pace: is awaited after each piece of the work."""
        shown: dict[str, tuple[world.Node, Node]] = {}
        for node in sorted(nodes, key=lambda each: each.called):
            before = self._shown.get(node.address)
            shown[node.address] = before if before and before[0] is node else (node, await _node_state(node, pace))
            _, made = shown[node.address]
            for (snapshot, there), copy in zip(_in_order(node), made.copies, strict=True):
                copies.add(node.address, snapshot, there, copy.seconds_to_serve)
            await pace()
        self._shown = shown
        return tuple(made for _, made in shown.values())


def _in_order(node: world.Node) -> list[tuple[SnapshotName, world.Residency]]:
    return sorted(node.residencies.items(), key=lambda each: (each[0].namespace, each[0].name))


async def _node_state(node: world.Node, pace: Callable[[], Awaitable[None]]) -> Node:
    shown, rungs = [], {each.name.lower(): [0, 0, 0] for each in list(Rung)[1:]} | {"gpu": [0, 0, 0]}
    for number, (snapshot, there) in enumerate(_in_order(node)):
        if number % _AT_A_TIME == 0:
            await pace()
        seconds, weights = seconds_to_serve(node, there), total_bytes(there) - there.image_bytes
        rung, weights_rung = there.rung.name.lower(), there.weights_rung.name.lower() if weights else None
        rungs[rung][0] += 1
        rungs[rung][1] += there.image_bytes
        if weights_rung in rungs:
            rungs[weights_rung][2] += weights
        shown.append(
            Copy(
                snapshot=str(snapshot),
                rung=rung,
                image_bytes=there.image_bytes,
                weights_rung=weights_rung,
                weights_bytes=weights,
                gpu_bytes=sum(there.gpu_bytes),
                pinned=there.pinned.name.lower() if there.pinned > Rung.ABSENT else None,
                seconds_to_serve=None if math.isinf(seconds) else seconds,
                unusable=there.unusable or None,
            )
        )
    return Node(
        name=node.called,
        address=node.address,
        presence=Presence.HEARD if node.synced else Presence.SILENT if node.silent else Presence.UNHEARD,
        cordoned=bool(node.standing and node.standing.cordoned),
        zone=node.zone or None,
        memory=Memory(node.memory_total_bytes, node.memory_free_bytes, node.staged_bytes, node.staged_limit_bytes),
        gpus=tuple(_gpu(each) for each in node.gpus),
        rates=_rates(node.rates),
        rungs={rung: RungUse(*numbers) for rung, numbers in rungs.items() if any(numbers)},
        moves=tuple(_move(node, each) for each in node.transfers),
        sources=tuple(Origin(each.name, each.rate or None, each.fault or None) for each in node.sources),
        copies=tuple(shown),
    )


def _gpu(gpu: world.Gpu) -> Gpu:
    return Gpu(
        uuid=gpu.uuid,
        model=gpu.model or None,
        total_bytes=gpu.total_bytes,
        free_bytes=gpu.free_bytes,
        unused_bytes=gpu.unused_bytes,
        pool_bytes=gpu.pool_bytes,
        parked_bytes=gpu.parked_bytes,
        others_bytes=gpu.others_bytes,
    )


def _rates(rates: world.Rates) -> Rates:
    return Rates(
        remote_to_disk=rates.remote_to_disk or None,
        disk_to_memory=rates.disk_to_memory or None,
        memory_to_process=rates.memory_to_process or None,
        disk_to_gpu=rates.disk_to_gpu or None,
        memory_to_gpu=rates.memory_to_gpu or None,
    )


def _move(node: world.Node, transfer: world.Transfer) -> Move:
    if transfer.weights_rung is not None:
        there = node.residencies.get(transfer.snapshot)
        above, to = (_WEIGHTS_ON[there.weights_rung] if there else "disk"), _WEIGHTS_ON[transfer.weights_rung]
    else:
        above, to = "remote" if transfer.rung <= Rung.DISK else "disk", transfer.rung.name.lower()
    return Move(str(transfer.snapshot), above, to, transfer.done_bytes, transfer.total_bytes, transfer.since)
