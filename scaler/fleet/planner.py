"""The planner: what makes the world be looked at, and the way from there to what is done.

    ledger, nodes, owners' wishes  ──►  World  ──►  decide (plan/policy.py)  ──►  executor

It decides when a model comes to have demand, when a pod of it comes to a node, when a node's news concern it or its GPUs come to have room
for it or none, when the cluster says something else of any node (a cordon, a taint, a label), when its owner's wishes change, when an
action of it has ended, and when what was put off is due, or a model has had no demand for so long that its replicas may sleep. The
decision is made in the same turn of the loop as the news: staging runs beside the push to KEDA.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from scaler.books.ledger import Ledger
from scaler.books.snapshot_name import SnapshotName
from scaler.books.trigger import Trigger
from scaler.fleet.concern import Concern
from scaler.fleet.executor import Executor
from scaler.fleet.nodes import Nodes
from scaler.plan.actions import Drop, Stage
from scaler.plan.copies import is_short
from scaler.plan.declared import DeclaredModels
from scaler.plan.policy import Plan, decide
from scaler.plan.remote import is_cramped
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, NodeSet, Residency, World
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_AS = {Rung.DISK: "on disk", Rung.MEMORY: "in memory", Rung.STANDBY: "a standby", Rung.PARKED: "parked", Rung.ABSENT: "absent"}


class Planner:
    """Hooks into the ledger and the nodes; `close` ends what it has begun.

    models: what their owners wish, kept up to date in place by whoever reads it. in_flight: requests of a replica, by its id. quotas: as a
    World's.
    """

    def __init__(
        self,
        ledger: Ledger,
        nodes: Nodes,
        models: DeclaredModels,
        executor: Executor,
        in_flight: Callable[[str], int] = lambda _: 0,
        clock: Clock = SYSTEM_CLOCK,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        self._quotas = quotas or {}
        self._barred: dict[str, set[Stage]] = {}  # by model, what its namespace's quota had no room for at the last look
        self._refused: Callable[[Stage, str, str], None] = lambda stage, node, why: None
        self._clock = clock
        self._ledger = ledger
        self._nodes = nodes
        self._models = models
        self._executor = executor
        self._in_flight = in_flight
        self._wanted: dict[str, int] = {}  # replicas, of models whose replicas are made here
        self._longest_staging: dict[str, float] = {}
        self._due: dict[str, asyncio.TimerHandle] = {}
        self._parked: set[tuple[str, str]] = set()  # (node's address, digest) of what stood parked at the last look
        self._arriving: Callable[[str], Collection[str]] = lambda model: ()
        self._cramped_since: dict[str, float] = {}
        self._short_since: dict[str, float] = {}
        self._asked_at: dict[SnapshotName, float] = {}
        self._concern = Concern(models)
        self._any_node: asyncio.TimerHandle | None = None  # the next look at those for which any node's news count
        self._rested_at = -math.inf
        ledger.on_quiet(self._quiet)
        ledger.on_asked(self._asked)
        ledger.on_first_demand(lambda model: self.consider([model]))
        nodes.on_change(self._heard)
        nodes.on_room(self._heard_of_room)
        nodes.on_place(self._placed)
        executor.on_end(lambda model: self.consider([model]))
        executor.wanted_by(lambda snapshot: bool(models.of(snapshot)))

    def on_refused(self, refused: Callable[[Stage, str, str], None], complained: Callable[[Stage, str, str], None]) -> None:
        """As Executor.on_refused; `refused` hears of what a quota bars, too, at each look."""
        self._refused = refused
        self._executor.on_refused(refused, complained)

    def arriving_by(self, arriving: Callable[[str], Collection[str]]) -> None:
        """`arriving`: names of the nodes on which pods of a model wait for their engines."""
        self._arriving = arriving

    def want(self, model: str, replicas: int) -> None:
        """So many replicas of the model are wanted here."""
        self._wanted[model] = replicas
        self.consider([model])

    def keep_changed(self, snapshot: SnapshotName) -> None:
        """A model wishes the snapshot to be kept otherwise: another pin, other copies. Others may have the same one."""
        self.consider(self._models.in_order(self._models.of(snapshot)))

    def triggered(self, trigger: Trigger) -> None:
        """Takes the bound on staging from a model's trigger."""
        self._longest_staging.pop(trigger.model, None)
        if trigger.max_stage_seconds is not None:
            self._longest_staging[trigger.model] = trigger.max_stage_seconds
        self._models.changed(trigger.model)

    def consider(self, models: Iterable[str]) -> None:
        """Decides for these models, as far as they are declared, and has it done."""
        models = list(models)
        for name in models:
            if name in self._models:
                self._note_taken_down(self._models[name])
        nodes = NodeSet(self._nodes)
        self._note(models, nodes)
        world = self._world(models, nodes)
        plan = decide(world)
        for model, why in plan.unmet.items():
            self._ledger.report_failure(model, why)
        self._executor.carry_out(plan)
        self._tell_of_barred(world, plan.barred)
        self._look_again(world, plan.due)

    def world(self, models: Iterable[str]) -> World:
        """What is known now of these models, and of all nodes."""
        return self._world(models, NodeSet(self._nodes))

    def preview(self, models: Iterable[str]) -> tuple[World, Plan]:
        """What would be decided for these models at this moment, and by what world. Nothing is done or noted."""
        world = self.world(models)
        return world, decide(world)

    def stagings(self) -> list[float]:
        """As Executor.stagings."""
        return self._executor.stagings()

    @property
    def refusals(self) -> Mapping[tuple[str, str, Rung], str]:
        """As Executor.refusals."""
        return self._executor.refusals

    def refusal(self, node: str, digest: str, rung: Rung) -> str:
        """As Executor.refusal."""
        return self._executor.refusal(node, digest, rung)

    def _world(self, models: Iterable[str], nodes: NodeSet) -> World:
        found = {name: self._model(self._models[name]) for name in models if name in self._models}
        return World(
            now=self._clock.now(),
            models=found,
            nodes=nodes,
            demand={name: self._ledger.demand_anywhere(name) for name in found if self._ledger.knows(name)},
            in_flight={each.id: self._in_flight(each.id) for name in found for _, each in nodes.running(name)},
            under_way=self._executor.under_way,
            put_off=self._executor.put_off,
            pins_put_off=self._executor.pins_put_off,
            quiet_since={name: self._ledger.quiet_since(name) for name, model in found.items() if model.idle is not None},
            cramped_since=_of(found, self._cramped_since),
            short_since=_of(found, self._short_since),
            asked_at=self._asked_at,
            arriving={name: self._arriving(name) for name in found},
            quotas=self._quotas,
        )

    def overview(self) -> World:
        """What is known now of all models and nodes, without what times a plan of one model (cramped, short, quiet): it costs no more."""
        longest = self._longest_staging
        models = {name: replace(each, longest_staging=longest[name]) if name in longest else each for name, each in self._models.items()}
        return World(
            now=self._clock.now(),
            models=models,
            nodes=tuple(self._nodes),
            demand={name: self._ledger.demand_anywhere(name) for name in models if self._ledger.knows(name)},
            under_way=self._executor.under_way,
            put_off=self._executor.put_off,
            arriving={name: arriving for name in models if (arriving := self._arriving(name))},
            quotas=self._quotas,
        )

    def begin(self, actions: Iterable[Stage | Drop]) -> list[Stage | Drop]:
        """Has these done beside what `consider` decides, but for those that are under way; returns them."""
        begun = [each for each in actions if each not in self._executor.under_way]
        self._executor.carry_out(Plan(tuple(begun)))
        return begun

    def why_no_higher(self, node: Node, residency: Residency) -> str:
        """Why the snapshot does not stand one rung higher on the node, where its agent was asked for that and refused; else empty."""
        for rung in Rung:
            if rung == residency.rung + 1 and (why := self._executor.refusal(node.address, residency.digest, rung)):
                return f"not {_AS[rung]}: {why}"
        return ""

    def why_not_fetched(self, node: Node, snapshot: SnapshotName) -> str:
        """Why the snapshot is not on the node, where its agent was asked to fetch it and could not; else empty."""
        if snapshot in node.residencies:
            return ""
        digests = {other.residencies[snapshot].digest for other in self._nodes if snapshot in other.residencies}
        found = (self._executor.refusal(node.address, digest, Rung.DISK) for digest in sorted(digests))
        return next((f"not fetched: {why}" for why in found if why), "")

    async def close(self) -> None:
        for timer in (*self._due.values(), *([self._any_node] if self._any_node else [])):
            timer.cancel()
        await self._executor.close()

    def _model(self, declared: Model) -> Model:
        return replace(
            declared,
            replicas=self._wanted.get(declared.name, declared.replicas),
            longest_staging=self._longest_staging.get(declared.name, declared.longest_staging),
            not_before=self._executor.not_before(declared.name),
            pin=self._models.pin(declared.snapshot),
        )

    def _note(self, models: Iterable[str], nodes: NodeSet) -> None:
        """Since when something lasts that is acted upon when it has for a while, and what of it any node's news may change."""
        now = self._clock.now()
        for model in (self._models[name] for name in models if name in self._models):
            for since, holds in ((self._cramped_since, is_cramped(nodes, model)), (self._short_since, is_short(nodes, model))):
                if holds:
                    since.setdefault(model.name, now)
                else:
                    since.pop(model.name, None)
            self._concern.decided(model, nodes, self._arriving(model.name))

    def _tell_of_barred(self, world: World, barred: Mapping[Stage, str]) -> None:
        """Each time, since who hears of it may not have listened before."""
        before = {stage for model in world.models for stage in self._barred.pop(model, ())}
        called = {node.address: node.called for node in world.nodes} if barred else {}
        for stage, why in barred.items():
            self._barred.setdefault(stage.model, set()).add(stage)
            self._refused(stage, called[stage.node], why)
            if stage not in before:
                log.info("%s is not staged on %s: %s", stage.model, called[stage.node], why)

    def _note_taken_down(self, model: Model) -> None:
        """What stood parked at the last look, and does so no more, was woken, or its agent made room on a GPU. To ask for it again in that
        same moment would take the room from those who wanted it.
        """
        if model.snapshot is None or model.stage < Rung.PARKED:
            return
        for node in self._nodes:
            if (residency := node.residencies.get(model.snapshot)) is None:
                continue
            key = node.address, residency.digest
            if node.synced and residency.rung is Rung.PARKED:
                self._parked.add(key)
            elif key in self._parked:
                self._parked.remove(key)
                if node.synced:  # else its agent has gone, and what it kept with it
                    self._executor.taken_down(*key, Rung.PARKED)

    def _asked(self, model: str) -> None:
        declared = self._models.get(model)
        if declared is not None and declared.snapshot is not None:
            self._asked_at[declared.snapshot] = math.inf

    def _quiet(self, model: str) -> None:
        """Its last request has ended. A look that is due anyway will see to it: requests come and go all the time."""
        declared = self._models.get(model)
        if declared is not None and declared.snapshot is not None:
            self._asked_at[declared.snapshot] = self._clock.now()
        if declared is not None and declared.idle is not None and model not in self._due:
            self._due[model] = asyncio.get_running_loop().call_later(declared.idle_seconds, self.consider, [model])

    def _heard(self, node: Node) -> None:
        """Models that the news concern (concern.py); with them those for which any node's news count, unless they were looked at just now:
        when a thousand nodes are heard one by one, that would be all models each time.
        """
        concerned = {*self._concern.of(node, self._nodes), *self._wanted}
        loop = asyncio.get_running_loop()
        began = loop.time()
        if began >= self._rested_at:
            concerned |= self._of_any_node()
        elif self._any_node is None:
            self._any_node = loop.call_at(self._rested_at, self._look_at_any_node)
        if concerned:
            self.consider(self._models.in_order(concerned))
        if began >= self._rested_at:
            self._rest(loop.time() - began)

    def _placed(self, name: str) -> None:
        """As news of the node: what it has counts for nothing now, or again, and any model that lacks a node may take it."""
        for node in [each for each in self._nodes if each.name == name]:
            self._heard(node)

    def _heard_of_room(self, node: Node) -> None:
        if concerned := self._concern.of_room(node):
            self.consider(self._models.in_order(concerned))

    def _of_any_node(self) -> set[str]:
        return {*self._concern.take_open(), *self._cramped_since, *self._short_since, *self._barred}

    def _look_at_any_node(self) -> None:
        self._any_node, began = None, asyncio.get_running_loop().time()
        if concerned := self._models.in_order(self._of_any_node()):
            self.consider(concerned)
        self._rest(asyncio.get_running_loop().time() - began)

    def _rest(self, took: float) -> None:
        """So that a tenth of the time goes into it at most."""
        self._rested_at = asyncio.get_running_loop().time() + 9 * took

    def _look_again(self, world: World, due: Mapping[str, float]) -> None:
        for model in world.models:
            if timer := self._due.pop(model, None):
                timer.cancel()
            if model in due:
                self._due[model] = asyncio.get_running_loop().call_later(due[model] - world.now, self.consider, [model])


def _of(models: Iterable[str], moments: Mapping[str, float]) -> dict[str, float]:
    return {name: moments[name] for name in models if name in moments}
