"""Which snapshots go into memory before anybody asks, and which leave it for them: by the forecast, over all nodes at once. Pure.

    worth     chance of a request × (a hit + the seconds that it saves, or their square: the objective) ÷ bytes (worth.py), of each model
              on each node
    newcomer  a snapshot on a node's disk whose owner wants it no higher, that stands in no fitting node's memory and is not on its way;
              or one in memory whose weights are not
    place     the room that is free, where it fits best; else the node on which least is lost, if the newcomer is worth `SWAP` times all
              that leaves for it together (displaced.py)

A chance is an estimate, and bytes cost whoever needs the disk. So a node takes one at a time, and none while a request waits for what it
has, while a replica starts there, or while anything comes up into its memory: the agent then has all of its disk for that. What was moved
lately stays as it is for `LEFT_SECONDS`, whichever way it was moved, and what has begun goes on. A namespace at its quota gets nothing more
(quotas.py).

An owner's wish is the floor: what one wants in memory, has pinned, what has replicas or requests, or stands higher than memory, leaves for
nobody, and is staged by the policy alone. Nothing is fetched from other nodes, and no pod is asked for: a wrong forecast costs reads of one
disk.

Nothing is moved at all before the forecast has earned it (`has_earned`): it has to be better than each model's mean rate by so much that
this is no chance. One that has lost its credit since moves nothing any more. A single model that it foretells badly is passed over.
Rejected: to drop what is worth little, to have room for later. It costs nothing where it stands, and agents make room for a request at
once.
"""

from __future__ import annotations

import enum
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import Drop, Stage, Start
from scaler.plan.displaced import Pair, Parts, Step, coming, displaced, standing
from scaler.plan.estimate import has_room, seconds_to_serve, seconds_to_stage
from scaler.plan.quotas import Room
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, Residency, World
from scaler.plan.worth import OBJECTIVES, SWAP, Objective, worth

WITHIN_SECONDS = 600.0  # the time that a chance is of: long beside a look a minute, short beside what idle times teach
LEFT_SECONDS = 600.0  # that time has to pass, or the chances that a move was made for have hardly changed
ENOUGH_STATEMENTS = 1000  # minutes of idle models: most of a day of one, ten minutes of a hundred
ENOUGH_CREDIT = 5.0  # nats: what happened was 150 times likelier by the forecast than by the mean rates

Moved = Mapping[tuple[str, str], float]  # (node's address, digest) → the moment at which it was moved last


class Decision(enum.Enum):
    """What is done about a model ahead of need."""

    STAGE = "staged"
    DROP = "dropped"
    STAYS = "stays"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Terms:
    """What was weighed of one model. chance: of a request within `WITHIN_SECONDS`. node: address of the one where it stands in memory, goes
    there or would be worth most; empty: there is none. saved_seconds: for a request there, by its bytes in memory; bytes: of image and
    weights, what comes or stands there. worth: of each byte. why: of the decision, in words.
    """

    model: str
    chance: float
    decision: Decision
    why: str
    node: str = ""
    saved_seconds: float = 0.0
    bytes: int = 0
    worth: float = 0.0


@dataclass(frozen=True, slots=True)
class Ahead:
    """actions: of a node, what leaves its memory before what comes. terms: of each model, by name. within_seconds: what chances are of.

    objective: what was weighed.
    """

    actions: tuple[Stage | Drop, ...] = ()
    terms: Mapping[str, Terms] = field(default_factory=dict)
    within_seconds: float = WITHIN_SECONDS
    objective: Objective = OBJECTIVES["mean"]


def has_earned(statements: int, credits: Mapping[str, float], before: bool) -> bool:
    """Whether the forecast may move bytes. credits: nats by which it was better than the mean rate of late, by model (Forecast.credits).

    before: whether it might at the last look: it may as long as it has any credit, then, so that it does not swing.
    """
    credit = sum(credits.values())
    return statements >= ENOUGH_STATEMENTS and credit > (0.0 if before else ENOUGH_CREDIT)


def moves_nothing(models: Mapping[str, Model]) -> bool:
    """Whether whatever the forecast says there is nothing to do: owners want all of their snapshots in memory anyway."""
    return all(model.snapshot is None or model.stage >= Rung.MEMORY for model in models.values())


def ahead(
    world: World,
    chances: Mapping[str, float],
    *,
    earned: bool,
    credits: Mapping[str, float] | None = None,
    moved: Moved | None = None,
    objective: Objective = OBJECTIVES["mean"],
) -> Ahead:
    """What is to be moved now. The same world gives the same answer, whatever the order of its models and nodes.

    world: of all models and nodes. chances: of a request within `WITHIN_SECONDS`, by model; a model without one is passed over. credits: as
    in `has_earned`. moved: what was moved ahead of need, or has left memory, and when, by the clock of the world.
    """
    if not earned:
        why = "the forecast has not shown that it is better than each model's mean rate: it moves nothing"
        return Ahead((), {name: Terms(name, chances.get(name, 0.0), Decision.NOTHING, why) for name in world.models}, objective=objective)
    return _Look(world, chances, credits or {}, moved or {}, objective).placed()


class _Look:
    """One look at the world. Its tables are made once, then models are placed one after the other."""

    def __init__(
        self, world: World, chances: Mapping[str, float], credits: Mapping[str, float], moved: Moved, objective: Objective
    ) -> None:
        self._world, self._chances, self._credits, self._objective = world, chances, credits, objective
        self._lately = {key for key, at in moved.items() if at + LEFT_SECONDS > world.now}
        self._nodes = {node.address: node for node in sorted(world.nodes, key=lambda each: each.address) if node.synced and not node.silent}
        self._models = [world.models[name] for name in sorted(world.models)]
        self._named: defaultdict[SnapshotName, list[Model]] = defaultdict(list)
        for model in self._models:
            if model.snapshot is not None:
                self._named[model.snapshot].append(model)
        replicas = {replica.model for node in world.nodes for replica in node.replicas.values()}
        demand = {name: world.demand_of(name) for name in world.models}
        self._asked = {name for name, each in demand.items() if not each.idle or each.replicas or name in replicas}
        self._waiting = {name for name in self._asked if demand[name].pending and name not in replicas}
        self._busy = dict(self._why_busy())
        self._why_not = dict(self._why_none())  # by model
        self._nowhere: dict[str, str] = {}  # of models that could be staged: why on no node
        self._quota = Room(world)

    def placed(self) -> Ahead:
        residents = self._residents()
        room = {address: Parts.free_on(node) for address, node in self._nodes.items()}
        actions: list[Stage | Drop] = []
        terms: dict[str, Terms] = {}
        taken: set[str] = set()
        for name, pairs in self._newcomers().items():
            best, namespace = pairs[0], pairs[0].snapshot.namespace
            within = [each for each in pairs if each.size.image <= self._quota.left(namespace)]
            if not within:
                terms[name] = self._terms(best, Decision.NOTHING, self._quota.why_full(namespace))
                continue
            free = [each for each in within if each.node.address not in taken]
            if not free:
                terms[name] = self._terms(best, Decision.NOTHING, "one at a time: its node takes another first")
                continue
            if fitting := [each for each in free if not room[each.node.address].lacks(each.size)]:
                # Where its image stands already it takes least, whatever each byte is worth.
                into = min(fitting, key=lambda each: (bool(each.size.image), -each.worth, room[each.node.address].image - each.size.image))
                leaving: list[Pair] = []
                why = f"{self._told(into)}, and there is room"
            elif found := displaced(free, room, residents):
                into, leaving = found
                why = f"{self._told(into)}: over {SWAP} times what leaves for it ({', '.join(each.model.name for each in leaving)})"
            else:
                terms[name] = self._terms(best, Decision.NOTHING, f"no room, and it is not worth {SWAP} times what would have to leave")
                continue
            taken.add(into.node.address)
            self._quota.give(into.snapshot.namespace, int(into.size.image))
            whole = bool(room[into.node.address].lacks(into.size).weights)
            for each in leaving:
                less = f"{name} is worth over {SWAP} times as much there"
                terms.setdefault(each.model.name, self._terms(each, Decision.DROP, less))
                actions.append(Drop(each.node.address, each.model.name, each.snapshot, each.there.digest, Rung.DISK, less, weights=whole))
            terms[name] = self._terms(into, Decision.STAGE, why)
            actions.append(Stage(into.node.address, name, into.snapshot, into.there.digest, Rung.MEMORY, f"ahead of need: {why}"))
        for pair in (each for pairs in residents.values() for each in pairs if each.there.rung is Rung.MEMORY):
            terms.setdefault(pair.model.name, self._terms(pair, Decision.STAYS, "it stands in memory, and nothing is worth so much more"))
        for name in self._world.models:
            why = self._why_not.get(name) or self._nowhere.get(name) or "no node that takes its pods has it on disk"
            terms.setdefault(name, Terms(name, self._chances.get(name, 0.0), Decision.NOTHING, why))
        return Ahead(tuple(actions), terms, objective=self._objective)

    # --- who takes part

    def _why_busy(self) -> Iterator[tuple[str, str]]:
        """Nodes into whose memory nothing is staged now, and why."""
        for each in self._world.under_way:
            if isinstance(each, Stage) and (each.rung > Rung.DISK or each.urgent):
                yield each.node, f"{each.model} is on its way into memory there"
            elif isinstance(each, Drop):
                yield each.node, f"{each.model} is leaving memory there"
            elif isinstance(each, Start) and each.node:
                yield each.node, f"a replica of {each.model} starts there"
        waiting = {self._world.models[name].snapshot for name in self._waiting}
        awaited = {name for names in self._world.arriving.values() for name in names}
        for address, node in self._nodes.items():
            if any(each.rung > Rung.DISK for each in node.transfers):
                yield address, "another one is on its way into memory there"
            if not waiting.isdisjoint(node.residencies):
                yield address, "requests wait for what it has"
            if node.name in awaited:
                yield address, "a pod there waits for its engine"

    def _why_none(self) -> Iterator[tuple[str, str]]:
        """Models that are staged ahead of need on no node, and why."""
        in_memory = set(self._in_memory())
        for model in self._models:
            if model.snapshot is None:
                yield model.name, "it has no snapshot"
            elif model.stage >= Rung.MEMORY:
                yield model.name, "its owner wants it in memory: the policy sees to that"
            elif model.name in self._asked:
                yield model.name, "it has requests or replicas, or a source of its demand is silent"
            elif model.snapshot in in_memory:
                yield model.name, "it stands in memory, or is on its way there"
            elif self._chances.get(model.name, 0.0) <= 0.0:
                yield model.name, "the forecast says nothing of it"
            elif self._credits.get(model.name, 0.0) < 0.0:
                yield model.name, "of late its mean rate would have foretold it better"

    def _in_memory(self) -> Iterator[SnapshotName]:
        """What stands in the memory of a node that takes pods of it, or is on its way there: it needs no second copy."""
        for each in self._world.under_way:
            if isinstance(each, Stage) and each.rung > Rung.DISK and each.node in self._nodes:
                yield each.snapshot
        for node in self._nodes.values():
            for name, there in node.residencies.items():
                stands = there.rung >= Rung.MEMORY and not there.unusable and not _is_half(node, there)
                if stands and any(not model.why_not_on(node) for model in self._named.get(name, ())):
                    yield name

    def _why_not_here(self, model: Model, node: Node, there: Residency) -> str:
        """Why the model is not staged ahead of need on this node; empty: it could be."""
        on = node.called
        if there.unusable:
            return f"it cannot be restored on {on}: {there.unusable}"
        if why := model.why_not_on(node) or self._busy.get(node.address, ""):
            return f"not on {on}: {why}"
        put_off = self._world.put_off.get((node.address, there.digest, Rung.MEMORY), -math.inf)
        reasons = {
            f"{on} has another snapshot of that name": model.digest not in (None, there.digest),
            f"no room on the GPUs of {on}": not has_room(node, there),
            f"on {on} it would take longer than its owner allows": seconds_to_stage(node, there) > model.longest_staging,
            f"the agent of {on} refused it a while ago": put_off > self._world.now,
            f"it was moved on {on} a while ago": (node.address, there.digest) in self._lately,
        }
        return next((why for why, holds in reasons.items() if holds), "")

    def _newcomers(self) -> dict[str, list[Pair]]:
        """By model, the worthiest first, where each could be staged; of each model the best node first."""
        able: list[tuple[Model, Node, Residency]] = []
        for node in self._nodes.values():
            for name, there in node.residencies.items():
                if not there.image_bytes or not (there.rung is Rung.DISK or _is_half(node, there)):
                    continue
                for model in self._named.get(name, ()):
                    if model.name in self._why_not:
                        continue
                    if why := self._why_not_here(model, node, there):
                        self._nowhere[model.name] = why
                    else:
                        able.append((model, node, there))
        found: dict[str, list[Pair]] = {}
        asks: dict[SnapshotName, str] = {}
        for pair in self._weighed(able, coming):
            if pair.saved_seconds <= 0.0:
                self._nowhere.setdefault(pair.model.name, "no second is saved by its bytes in memory")
            elif asks.setdefault(pair.snapshot, pair.model.name) == pair.model.name:  # of several with one snapshot, the likeliest
                found.setdefault(pair.model.name, []).append(pair)
            else:
                self._nowhere.setdefault(pair.model.name, f"its snapshot is {asks[pair.snapshot]}'s, too, which is likelier")
        return found

    def _residents(self) -> dict[str, list[Pair]]:
        """By node's address, what may leave its memory, the least worth first: also weights whose image is on disk."""
        stays = {(each.node, each.digest) for each in self._world.under_way if isinstance(each, Stage | Drop)} | self._lately
        able: list[tuple[Model, Node, Residency]] = []
        for node in self._nodes.values():
            for name, there in node.residencies.items():
                models = self._named.get(name, ())
                if there.rung not in (Rung.DISK, Rung.MEMORY) or there.pinned >= Rung.MEMORY or not models:
                    continue
                if (node.address, there.digest) in stays or (there.rung is Rung.DISK and (not there.weights_bytes or there.lacks_weights)):
                    continue
                if all(each.stage < Rung.MEMORY and each.pin < Rung.MEMORY and each.name not in self._asked for each in models):
                    likeliest = max(models, key=lambda each: self._chances.get(each.name, 0.0))
                    able.append((likeliest, node, there))
        found: defaultdict[str, list[Pair]] = defaultdict(list)
        for pair in reversed(self._weighed(able, standing)):
            found[pair.node.address].append(pair)
        return found

    # --- what it is worth

    def _weighed(self, able: list[tuple[Model, Node, Residency]], step_of: Callable[[Residency], Step]) -> list[Pair]:
        """The worthiest first; of equal ones by the names of models, then by the nodes' addresses. step_of: `coming` or `standing`."""
        if not able:
            return []
        steps = [step_of(there) for _, _, there in able]
        chance = np.array([self._chances.get(model.name, 0.0) for model, _, _ in able])
        saved = np.array([_saved_seconds(node, step) for (_, node, _), step in zip(able, steps, strict=True)])
        sizes = np.array([max(step.bytes, 1) for step in steps], dtype=np.float64)
        worths = worth(chance, saved, sizes, self._objective)
        addresses, names = np.array([node.address for _, node, _ in able]), np.array([model.name for model, _, _ in able])
        order: list[int] = np.lexsort((addresses, names, -worths)).tolist()
        return [Pair(*able[at], steps[at].size, steps[at].bytes, float(saved[at]), float(worths[at])) for at in order]

    def _terms(self, pair: Pair, decision: Decision, why: str) -> Terms:
        name = pair.model.name
        chance = self._chances.get(name, 0.0)
        return Terms(name, chance, decision, why, pair.node.address, pair.saved_seconds, pair.bytes, pair.worth)

    def _told(self, pair: Pair) -> str:
        chance = self._chances.get(pair.model.name, 0.0)
        return f"within {WITHIN_SECONDS / 60:.0f} minutes a request has a chance of {chance:.2g}, and is saved {pair.saved_seconds:.2g} s"


def _is_half(node: Node, there: Residency) -> bool:
    """Its image stands in memory, and its weights do not. Where nothing is known of the room for weights its agent sees to them."""
    return there.rung > Rung.DISK and there.lacks_weights and node.weights_room_bytes is not None


def _saved_seconds(node: Node, step: Step) -> float:
    """By the one estimate, with the node's GPUs free: what stands on a node whose GPUs are in use just now is not worth less for that."""
    empty = replace(node, gpus=tuple(replace(gpu, free_bytes=gpu.total_bytes) for gpu in node.gpus)) if node.gpus else node
    below = seconds_to_serve(empty, step.below)
    return below - seconds_to_serve(empty, step.above) if not math.isinf(below) else 0.0
