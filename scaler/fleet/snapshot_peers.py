"""Which agents a node can fetch a snapshot from that it does not have: those that have it, and those that are told to fetch it, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scaler.plan.actions import Action, Stage
from scaler.plan.rungs import Rung
from scaler.plan.world import Node


@dataclass(frozen=True, slots=True)
class SnapshotPeer:
    """One of them. complete: it has the snapshot."""

    node: str
    address: str  # HOST:PORT
    complete: bool


def peers_of(wanted: Stage, nodes: Iterable[Node], under_way: Iterable[Action]) -> tuple[SnapshotPeer, ...]:
    """For the node that is to stage it. None where that has it: then nothing is fetched."""
    told = {other.node for other in under_way if isinstance(other, Stage) and _same(other, wanted)}
    found = []
    for node in nodes:
        complete = _has(node, wanted)
        if node.address == wanted.node:
            if complete:
                return ()
        elif node.peer_address and node.synced and (complete or node.address in told):
            found.append(SnapshotPeer(node.name, node.peer_address, complete))
    return tuple(found)


def _same(one: Stage, other: Stage) -> bool:
    return (one.snapshot, one.digest) == (other.snapshot, other.digest)


def _has(node: Node, wanted: Stage) -> bool:
    residency = node.residencies.get(wanted.snapshot)
    return residency is not None and residency.digest == wanted.digest and residency.rung > Rung.ABSENT and not residency.unusable
