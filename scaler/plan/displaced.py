"""What a snapshot takes of a node's memory, of each of its two parts, and what has to leave for it. Pure.

    image     of what a node's agent lets images take
    weights   of what gpumem holds ahead of need there: lent memory, or its arena; of several GPUs, what one of them gets

Both are weighed together, as one model's bytes, and have room each for itself. What leaves goes whole where its weights are in the way;
else its weights stay where they stand, since nobody needs that room. A node says one number of the room for weights, the largest there is,
so on one with several GPUs what leaves may not leave where it is needed: gpumem makes room by itself then, or has it come to the arena.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.estimate import total_bytes
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Model, Node, Residency
from scaler.plan.worth import SWAP

SPARE_BYTES = 256 << 20  # of a node's memory that its agent never stages into (restore_agent/sequences/memory_budget.py)


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes, of images and of weights; below 0: so many have to be given up before any could come."""

    image: float
    weights: float

    @classmethod
    def free_on(cls, node: Node) -> Parts:
        """What could still come there. Of weights an agent may say nothing: then gpumem sees to them, as it does for requests."""
        image = node.memory_free_bytes - SPARE_BYTES
        if node.staged_bytes is not None and node.staged_limit_bytes is not None:
            image = min(image, node.staged_limit_bytes - node.staged_bytes)
        return cls(image, math.inf if node.weights_room_bytes is None else node.weights_room_bytes)

    def lacks(self, wanted: Parts) -> Parts:
        """What has to leave before that could come; 0: nothing, as of a part that is not wanted."""
        return Parts(
            max(0.0, wanted.image - self.image) if wanted.image else 0.0,
            max(0.0, wanted.weights - self.weights) if wanted.weights else 0.0,
        )

    def __bool__(self) -> bool:
        return bool(self.image or self.weights)


@dataclass(frozen=True, slots=True)
class Pair:
    """A model's snapshot on one node, and what each byte is worth in memory there. size: of what comes there, or leaves; bytes: of all of
    it, on all GPUs.
    """

    model: Model
    node: Node
    there: Residency
    size: Parts
    bytes: int
    saved_seconds: float
    worth: float

    @property
    def snapshot(self) -> SnapshotName:
        assert self.model.snapshot is not None
        return self.model.snapshot


@dataclass(frozen=True, slots=True)
class Step:
    """Between all of a snapshot on disk and all of it in memory, what there is to bring, or to give up. size, bytes: as a Pair's.

    below, above: how it stands before, and behind.
    """

    size: Parts
    bytes: int
    below: Residency
    above: Residency


def coming(there: Residency) -> Step:
    """What its way into memory brings."""
    weights = max(there.weights_rung, WeightsRung.MEMORY) if there.weights_bytes else there.weights_rung
    return _step(there, replace(there, rung=max(there.rung, Rung.MEMORY), weights_rung=weights))


def standing(there: Residency) -> Step:
    """What would leave."""
    return _step(replace(there, rung=min(there.rung, Rung.DISK), weights_rung=min(there.weights_rung, WeightsRung.DISK)), there)


def _step(below: Residency, above: Residency) -> Step:
    image = below.image_bytes if below.rung < Rung.MEMORY <= above.rung else 0
    if not below.lacks_weights or above.lacks_weights:
        return Step(Parts(image, 0), image, below, above)
    return Step(Parts(image, below.weights_bytes), image + total_bytes(below) - below.image_bytes, below, above)


def displaced(pairs: Iterable[Pair], room: Mapping[str, Parts], residents: Mapping[str, list[Pair]]) -> tuple[Pair, list[Pair]] | None:
    """On which of a model's nodes least is lost if it comes there, and what has to leave; None: it is worth that nowhere.

    room, residents: by node's address; the least worth first.
    """
    found: tuple[Pair, list[Pair]] | None = None
    lowest = math.inf
    for pair in pairs:
        lacking, lost, leaving = room[pair.node.address].lacks(pair.size), 0.0, []
        for each in residents.get(pair.node.address, ()):
            if not lacking or each.worth > pair.worth / SWAP:
                break
            helps = (lacking.image and each.size.image) or (lacking.weights and each.size.weights)
            if helps and each.snapshot != pair.snapshot:
                lacking = each.size.lacks(lacking)
                lost += each.worth * each.bytes
                leaving.append(each)
        if not lacking and lost < lowest and lost * SWAP <= pair.worth * pair.bytes:
            found, lowest = (pair, leaving), lost
    return found
