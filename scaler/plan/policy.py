"""The policy: a world goes in, a plan comes out. Pure: the same world gives the same plan, and what it reads it was given.

    replicas   as many as are wanted here, on the nodes that serve soonest; what is too much ends, the least busy and youngest first,
               and what has not ended yet when more are wanted is kept
    demand     a model with requests and no replica has its best node stage at once, beside the push that brings the replica
    waiting    every snapshot stands on the rung that its owner names, on every node that has it, and goes there one rung at a time; a
               standby is made while nobody asks and no replica lives, and given up half-made when somebody does: the request's own restore
               is sooner. One that is being parked is not given up: that is most of what the request needs. What an agent took down from
               there, to make room on its GPU, is left there for a while
    remote     where a snapshot stands on nodes that cannot restore it, and no replica lives, for so long that this is no moment between two
               replicas, one node that could fetches it: the soonest, and one at a time. It stays there
    arrivals   where a pod has been put on a node that lacks its snapshot, that node fetches it at once, if a cold start takes longer; the
               agent has the pod wait for it, as long as that stays so
    copies     as many nodes keep a snapshot as its owner wants, in domains that do not fail together (copies.py)
    quotas     at its quota none of a namespace's snapshots go up into memory but for a request (quotas.py)
    sleep      where its owner wants it, replicas in pods sleep when their model had no request at any gateway for so long; a request wakes
               them at once, which is the gateway's to ask for, and no plan's
    pods       nodes are preferred by the estimate, for replicas and for captures alike; Kubernetes places. Where it would put no pod of the
               model (a cordon, taints, labels: scheduling.py), nothing is staged or fetched, and what is there stays and counts for nothing

Actions under way are not asked for again. What an agent refused is put off, not forgotten. Each action says why. What a forecast moves
ahead of requests is no business of this file (ahead.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from scaler.books.hpa import proportional
from scaler.plan.actions import Action, Drop, End, Keep, Pin, Prefer, Sleep, Stage, Start
from scaler.plan.best_nodes import best_nodes, seconds_on
from scaler.plan.copies import copy
from scaler.plan.estimate import ranked, seconds_to_fetch, seconds_to_serve, seconds_to_stage, seconds_to_start
from scaler.plan.quotas import within
from scaler.plan.remote import is_cramped, remote
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, Residency, World

# What a replica held is free again within seconds of its end, and an agent that is restarted is back within half a minute.
_CRAMPED_SECONDS_ASKED, _CRAMPED_SECONDS = 3.0, 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done. unmet: why a model has fewer replicas than are wanted and none is started, for those who wait for it.

    due: the moment at which what is put off of a model now may be done; of those of which something is. barred: what would take a namespace
    beyond its quota, and why.
    """

    actions: tuple[Action, ...] = ()
    unmet: Mapping[str, str] = field(default_factory=dict)
    due: Mapping[str, float] = field(default_factory=dict)
    barred: Mapping[Stage, str] = field(default_factory=dict)

    @property
    def look_again(self) -> float:
        """The first of these moments; infinite: there is none."""
        return min(self.due.values(), default=math.inf)


def decide(world: World) -> Plan:
    """The plan for every model of the world, in the models' order; nodes that tie are taken in theirs."""
    actions: list[Action] = []
    unmet: dict[str, str] = {}
    due: dict[str, float] = {}
    for model in world.models.values():
        later: list[float] = []
        if model.replicas is not None:
            wanted, why = _replicas(world, model)
            actions += wanted
            if why:
                unmet[model.name] = why
            if model.not_before > world.now:
                later.append(model.not_before)
        if model.name in world.targets:
            actions += _scaled(world, model)
        actions += _pinned(world, model, later)
        actions += _staged(world, model, later)
        actions += _arrivals(world, model)
        actions += _moved(world, model, later)
        actions += _asleep(world, model, later)
        if later:
            due[model.name] = min(later)
    done, barred = within(world, actions)
    return Plan(tuple(done), unmet, due, barred)


def prefer(world: World, model: Model, digest: str) -> Prefer:
    """Nodes for a pod that is restored from this snapshot, by the estimate: those that have it, or where none of them can restore it those
    that could fetch it, one of which will. Not both: a pod that comes before its snapshot starts cold, however short the way is."""
    holders = [(node, there) for node, there in _holders(world, model) if there.digest == digest and not model.why_not_on(node)]
    seconds = _finite({node.name: each for (node, _), each in zip(holders, seconds_on(holders), strict=True) if node.name})
    if not seconds:
        seconds = _finite({node.name: seconds_to_serve(node, there) for node, there in _candidates(world, model, digest) if node.name})
    return Prefer(model.name, seconds, "by the estimate of a restore", _silent(world))


def prefer_for_capture(world: World, model: Model) -> Prefer:
    """Nodes for a pod in which a snapshot is captured."""
    seconds = {node.name: seconds_to_start(node) for node in _synced(world) if node.name and not model.why_not_on(node)}
    return Prefer(model.name, _finite(seconds), "by the room for a start", _silent(world))


def _silent(world: World) -> tuple[str, ...]:
    return tuple(node.name for node in world.nodes if node.silent and node.name)


# Replicas that are ours to make.


def _replicas(world: World, model: Model) -> tuple[list[Action], str]:
    """Starts and ends, and why too few are started."""
    assert model.replicas is not None
    under_way = world.being_done.of_model(model.name)
    ends_under_way = [action for action in under_way if isinstance(action, End)]
    ending = {action.replica for action in ends_under_way}
    live = [(node, replica) for node, replica in world.node_set.running(model.name) if replica.id not in ending]
    starting = [action for action in under_way if isinstance(action, Start)]
    missing = model.replicas - len(live) - len(starting)
    if missing > 0:
        # One without requests may be ended by its agent in this very moment.
        unfinished = [action for action in ends_under_way if world.in_flight.get(action.replica)][:missing]
        kept: list[Action] = [Keep(model.name, end.node, end.replica, f"{model.replicas} wanted") for end in unfinished]
        missing -= len(kept)
        if not missing:
            return kept, ""
        if not any(True for _ in _synced(world)):
            return kept, "no restore agent is connected"
        if model.not_before > world.now:
            return kept, ""
        return [*kept, *_starts(world, model, starting, missing)], ""
    too_many = f"{model.replicas} wanted"
    ends: list[Action] = [End(model.name, start.node, "", too_many, number=start.number) for start in starting[: max(0, -missing)]]
    surplus = sorted(reversed(live), key=lambda pair: world.in_flight.get(pair[1].id, 0))
    for node, replica in surplus[: max(0, -missing - len(ends))]:
        ends.append(End(model.name, node.address, replica.id, too_many, model.parked_seconds, model.standby_seconds))
    return ends, ""


def _starts(world: World, model: Model, starting: list[Start], missing: int) -> Iterator[Start]:
    """One by one, each on the node that is best when those before it have taken their room."""
    nodes = {node.address: node for node in _synced(world)}
    for start in starting:
        if start.node in nodes:
            nodes[start.node] = _with_one_more(nodes[start.node], model)
    number = max((start.number for start in starting), default=0)
    for _ in range(missing):
        number += 1
        best, reason = _best(world, nodes, model)
        nodes[best.address] = _with_one_more(best, model)
        yield Start(model.name, best.address, reason, number=number)


def _best(world: World, nodes: Mapping[str, Node], model: Model) -> tuple[Node, str]:
    """The node that serves soonest, from the snapshot where that is possible; of those by address, of which there is at least one."""
    holders = [(node, there) for node in nodes.values() if (there := _residency(node, model)) is not None]
    for best, _, seconds in best_nodes(world, holders):
        return best, f"its snapshot is there: {seconds:.3g} s"
    cold = ranked({address: seconds_to_start(node) for address, node in nodes.items()})
    return nodes[cold[0] if cold else next(iter(nodes))], "no node can restore it now: the one with the most room"


def _with_one_more(node: Node, model: Model) -> Node:
    """The node once another replica of the model is made there. It wakes the standby, or the parked one, of which there is one alone, and
    takes its GPU memory as the agent places it: where most is free.
    """
    residency = _residency(node, model)
    if residency is None or model.snapshot is None:
        return node
    if residency.rung > Rung.MEMORY:
        node = replace(node, residencies={**node.residencies, model.snapshot: replace(residency, rung=Rung.MEMORY)})
    gpus = sorted(node.gpus, key=lambda gpu: -gpu.free_bytes)
    taken = dict(zip((gpu.uuid for gpu in gpus), residency.gpu_bytes, strict=False))
    return replace(node, gpus=tuple(replace(gpu, free_bytes=gpu.free_bytes - taken.get(gpu.uuid, 0)) for gpu in node.gpus))


# Replicas that Kubernetes makes.


def _scaled(world: World, model: Model) -> Iterator[Start]:
    """To the number that the HPA would ask for at its next look. It only raises, and never from zero: that is KEDA's."""
    target = world.targets[model.name]
    if not target.replicas:
        return
    demand = world.demand_of(model.name)
    worth = min(proportional(target.replicas, demand.load(target.target_pending), target.target_pending), target.max_replicas)
    if worth > target.replicas:
        cut_off = f", and nothing answers at {demand.unreachable} replicas" if demand.unreachable else ""
        reason = f"{demand.pending} requests wait, and one replica is meant for {target.target_pending:g}{cut_off}"
        yield Start(model.name, "", reason, worth)


def _asleep(world: World, model: Model, later: list[float]) -> Iterator[Sleep]:
    """Those that are awake, and nobody has asked for long enough; one that its agent refused is put off."""
    if model.idle is None or not world.demand_of(model.name).idle:
        return
    for node, replica in world.node_set.running(model.name):
        if not node.synced or replica.sleeps is not None:
            continue
        put_off = world.put_off.get((node.address, replica.id, model.idle), -math.inf)
        due = max(world.quiet_since.get(model.name, -math.inf), replica.since) + model.idle_seconds
        if max(due, put_off) > world.now:
            later.append(max(due, put_off))
            continue
        action = Sleep(node.address, model.name, replica.id, model.idle, f"nobody has asked it for {model.idle_seconds:g} s")
        if action not in world.under_way:
            yield action


# Snapshots.


def _pinned(world: World, model: Model, later: list[float]) -> Iterator[Pin]:
    """Wherever it is: as its owner wishes now."""
    for node, residency in _holders(world, model):
        if not residency.digest or residency.pinned is model.pin or model.snapshot is None:
            continue
        until = world.pins_put_off.get((node.address, residency.digest, model.pin), -math.inf)
        if until > world.now:
            later.append(until)
            continue
        action = Pin(node.address, model.name, model.snapshot, residency.digest, model.pin, "its owner wishes so")
        if action not in world.under_way:
            yield action


def _staged(world: World, model: Model, later: list[float]) -> Iterator[Action]:
    demand = world.demand_of(model.name)
    asked = demand.pending > 0
    under_way = world.being_done.of_model(model.name)
    ending = {action.replica for action in under_way if isinstance(action, End)}
    live = {replica.id for _, replica in world.node_set.running(model.name)}
    waits = asked and not live - ending
    if waits:
        for action in under_way:
            if isinstance(action, Stage) and action.rung is Rung.STANDBY:
                yield Drop(action.node, model.name, action.snapshot, action.digest, Rung.MEMORY, "a request's own restore is sooner")
    holders = [(node, there) for node, there in _holders(world, model) if not model.why_not_on(node)]
    soonest = best_nodes(world, holders)[:1] if waits else []
    for node, residency in holders:
        if any(node is best for best, _, _ in soonest):
            yield from _up(world, model, node, residency, Rung.MEMORY, "requests wait for it", later, urgent=True)
        elif model.stage >= Rung.MEMORY:
            yield from _up(world, model, node, residency, Rung.MEMORY, "its snapshot waits in memory", later)
        if asked or live or demand.replicas:
            continue
        if model.stage >= Rung.STANDBY:
            yield from _up(world, model, node, residency, Rung.STANDBY, "its snapshot waits as a standby", later)
        if model.stage >= Rung.PARKED:
            yield from _up(world, model, node, residency, Rung.PARKED, "its snapshot waits parked", later)


def _up(
    world: World, model: Model, node: Node, residency: Residency, rung: Rung, reason: str, later: list[float], *, urgent: bool = False
) -> Iterator[Stage]:
    """One rung up to `rung`, unless it stands elsewhere, is on its way, was refused lately, or would take too long."""
    assert model.snapshot is not None
    if residency.rung != rung - 1 or residency.unusable:
        return
    if rung is Rung.MEMORY and seconds_to_stage(node, residency) > model.longest_staging:
        return
    action = Stage(node.address, model.name, model.snapshot, residency.digest, rung, reason, urgent=urgent)
    until = world.put_off.get((node.address, residency.digest, rung), -math.inf)
    if until > world.now:
        later.append(until)
    elif action not in world.under_way:
        yield action


def _arrivals(world: World, model: Model) -> Iterator[Stage]:
    """Onto the disks of nodes where pods wait for their engines, and the snapshot is not."""
    here = world.arriving.get(model.name, ())
    if model.snapshot is None or not model.digest or not here:
        return
    for node, there in _candidates(world, model, model.digest):
        if node.name not in here or seconds_to_serve(node, there) >= min(there.cold_seconds, model.longest_staging):
            continue
        why = f"a pod of it has come there, and a cold start takes {there.cold_seconds:.3g} s"
        action = Stage(node.address, model.name, model.snapshot, there.digest, Rung.DISK, why, there.store)
        if action not in world.under_way:
            yield action


def _moved(world: World, model: Model, later: list[float]) -> list[Stage]:
    """The snapshot onto the disk of one more node; from there it goes up like any other. One node at a time."""
    if any(isinstance(each, Stage) and each.rung is Rung.DISK for each in world.being_done.of_model(model.name)):
        return []
    if fetched := list(_fetched(world, model, later)):
        return fetched
    another = copy(world, model, later)
    return [another] if another else []


def _fetched(world: World, model: Model, later: list[float]) -> Iterator[Stage]:
    """Where no holder can serve those who wait, or will."""
    asked = world.demand_of(model.name).pending > 0
    if model.snapshot is None or (not asked and model.stage < Rung.MEMORY) or not is_cramped(world.nodes, model):
        return
    due = world.cramped_since.get(model.name, world.now) + (_CRAMPED_SECONDS_ASKED if asked else _CRAMPED_SECONDS)
    if due > world.now:
        later.append(due)
        return
    bearable = [
        ((node, there), seconds_to_serve(node, there))
        for node, there in remote(world.nodes, model.snapshot, model.digest, model.stored, model.pods)
        if seconds_to_fetch(node, there) + seconds_to_stage(node, there) <= model.longest_staging
    ]
    for node, there in ranked(bearable):
        until = world.put_off.get((node.address, there.digest, Rung.DISK), -math.inf)
        if until > world.now:
            later.append(until)
            continue
        why = "requests wait, and no node that has its snapshot can restore it" if asked else "no node that has its snapshot can restore it"
        yield Stage(node.address, model.name, model.snapshot, there.digest, Rung.DISK, why, there.store, urgent=asked)
        return


def _candidates(world: World, model: Model, digest: str) -> list[tuple[Node, Residency]]:
    """Those that could fetch it, but for those whose agents have refused to."""
    if model.snapshot is None:
        return []
    found = remote(world.nodes, model.snapshot, digest, model.stored, model.pods)
    return [(node, there) for node, there in found if world.put_off.get((node.address, digest, Rung.DISK), -math.inf) <= world.now]


def _holders(world: World, model: Model) -> list[tuple[Node, Residency]]:
    return [(node, there) for node, there in world.node_set.having(model.snapshot) if node.synced]


def _residency(node: Node, model: Model) -> Residency | None:
    return node.residencies.get(model.snapshot) if model.snapshot is not None else None


def _synced(world: World) -> Iterator[Node]:
    return (node for node in world.nodes if node.synced)


def _finite(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds[name] for name in ranked(seconds)}
