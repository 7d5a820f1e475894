"""On which node a replica is made, of those that would serve it about as soon.

What nodes measure differs by some hundredths of a second from one restore to the next. Taken at its word, the node that was a little faster
last time gets every model that stands in no memory: its memory has to give one image up for the other, while that of all others is empty.
So nodes whose estimates differ by no more than measurements do are alike, and among these counts, in this order

    what is being done           it is on its way into the node's memory already
    what stands there            the higher rung, and then that of the weights
    what is lost by it           nothing, where the image finds room in memory; else it counts when the image was asked for that leaves for
                                 it, so that over all nodes that one leaves which was asked for least lately
    what is on its way there     bytes into the node's memory
    the estimate
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from operator import attrgetter

from scaler.plan.actions import Stage
from scaler.plan.estimate import seconds_to_serve
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, Rates, Residency, World

_rates = attrgetter(*(each.name for each in fields(Rates)))  # in the order in which Rates takes them
_NOTHING, _NEVER = -math.inf, 0.0  # moments
# Times the soonest, and beyond it: what is measured on one node from one time to the next. To stage an image again costs more than that.
_ALIKE, _ALIKE_SECONDS = 1.5, 0.05


def seconds_on(holders: Sequence[tuple[Node, Residency]]) -> list[float]:
    """The estimate for each. What a node has not measured yet is taken to be as it is on the others, the median: an own number for it would
    make those look best that nobody has tried, and each of them would be tried, with the bytes that this moves.
    """
    rates = _typical([_rates(node.rates) for node, _ in holders])
    overheads = _typical([_overheads(there) for _, there in holders])
    found = []
    for node, there in holders:
        own = _rates(node.rates)
        measured = node if all(own) else replace(node, rates=Rates(*_filled(own, rates)))
        overhead, parked = _filled(_overheads(there), overheads)
        found.append(seconds_to_serve(measured, replace(there, overhead_seconds=overhead, parked_overhead_seconds=parked)))
    return found


def _overheads(there: Residency) -> tuple[float, float]:
    return there.overhead_seconds, there.parked_overhead_seconds


def _typical(rows: Iterable[Sequence[float]]) -> list[float]:
    """Of each column the median of what was measured; 0: nobody has."""
    columns = ([value for value in column if value] for column in zip(*rows, strict=True))
    return [statistics.median(column) if column else 0.0 for column in columns]


def _filled(own: Iterable[float], typical: Iterable[float]) -> list[float]:
    return [value or other for value, other in zip(own, typical, strict=True)]


def best_nodes(world: World, holders: Sequence[tuple[Node, Residency]]) -> list[tuple[Node, Residency, float]]:
    """Nodes with the snapshot as it stands there, and the estimate of seconds; the best first, without those that never could."""
    places = [(node, there, seconds) for (node, there), seconds in zip(holders, seconds_on(holders), strict=True)]
    able = sorted((place for place in places if not math.isinf(place[2])), key=lambda place: place[2])
    if not able:
        return []
    bound = able[0][2] * _ALIKE + _ALIKE_SECONDS
    alike = [place for place in able if place[2] <= bound]
    if len(alike) > 1:
        alike.sort(key=lambda place: _order(world, *place))
    return [*alike, *able[len(alike) :]]


def _order(world: World, node: Node, there: Residency, seconds: float) -> tuple[bool, int, int, float, int, float]:
    staged = [each for each in world.being_done.at(node.address) if isinstance(each, Stage) and each.rung is Rung.MEMORY]
    others = (node.residencies.get(each.snapshot) for each in staged if each.digest != there.digest)
    coming = sum(other.image_bytes for other in others if other is not None)
    begun = any(each.digest == there.digest for each in staged)
    lost = _NOTHING if begun or there.rung >= Rung.MEMORY else _lost(world, node, there.image_bytes + coming)
    return not begun, -there.rung, -there.weights_rung, lost, coming, seconds


def _lost(world: World, node: Node, needed: int) -> float:
    """When the last of those was asked for that have to leave the node's memory for so many bytes."""
    if node.staged_limit_bytes is None or node.staged_bytes is None:
        missing = needed - node.memory_free_bytes
    else:
        missing = needed + node.staged_bytes - node.staged_limit_bytes
    if missing <= 0:
        return _NOTHING
    there = [(world.asked_at.get(name, _NEVER), each.image_bytes) for name, each in node.residencies.items() if each.rung >= Rung.MEMORY]
    for asked, size in sorted(there):
        missing -= size
        if missing <= 0:
            return asked
    return math.inf
