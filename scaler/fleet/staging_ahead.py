"""Bytes ahead of need, live: the forecast's word is looked at once a minute, and what plan/ahead.py makes of it is done.

    judged, or room on a node  ──►  World, chances  ──►  ahead (plan/ahead.py)  ──►  executor

Where an owner wants a snapshot in memory, or a request waits, the policy has it staged, as it does without any forecast; here goes what is
left of the nodes' memory. As long as the forecast has not earned it, nothing is looked at, and nothing moves. One scaler alone does this,
and not before its nodes have said what they have: one that is restarted finds there what the one before has staged.
The look is worked out in a thread, since for ten thousand models it takes long beside a request's way. What came meanwhile counts: where
the world has changed for a node, nothing is done there until the next look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.fleet.planner import Planner
from scaler.forecast.forecast import Forecast
from scaler.plan.actions import Action, Drop, Stage
from scaler.plan.ahead import LEFT_SECONDS, WITHIN_SECONDS, Ahead, ahead, has_earned, moves_nothing
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, World
from scaler.plan.worth import OBJECTIVES, Objective
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_GATHER_SECONDS = 5.0  # between two looks at least: nodes that give room do so several times in a row
_SETTLE_SECONDS = 120.0  # for so long a node that was not heard yet may come, and may have in memory what would be staged elsewhere

Key = tuple[str, str]  # a node's address, a digest


class StagingAhead:
    """fetched_bytes: of images and weights that were staged ahead of need; wasted_bytes: of those whose image left memory before a request
    for them came. hits: requests that came to an idle model, and found it so.
    """

    def __init__(
        self,
        planner: Planner,
        nodes: Nodes,
        ledger: Ledger,
        forecast: Forecast,
        clock: Clock = SYSTEM_CLOCK,
        objective: Objective = OBJECTIVES["mean"],
    ) -> None:
        self._objective = objective
        self._planner, self._nodes, self._ledger, self._forecast, self._clock = planner, nodes, ledger, forecast, clock
        self.is_active = False
        self.fetched_bytes = self.wasted_bytes = self.hits = 0
        self._moved: dict[Key, float] = {}
        self._begun: dict[Key, tuple[Stage, int]] = {}  # asked for, and not there yet; bytes
        self._standing: dict[Key, tuple[Stage, int]] = {}  # there, not asked for yet
        self._in_memory: dict[str, int] = {}  # snapshots, by node's address
        self._due = asyncio.Event()
        ledger.on_asked(self._asked)
        nodes.on_change(self._heard)
        nodes.on_place(lambda _: self.look_soon())

    def look_soon(self) -> None:
        """Something has changed: the minute is judged, or a node has room, or takes pods or takes none."""
        self._due.set()

    async def run(self) -> None:
        """Until it is cancelled. On Kubernetes the leader's."""
        began, has_heard = self._clock.now(), False
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                has_heard = has_heard or self._clock.now() - began >= _SETTLE_SECONDS or all(node.synced for node in self._nodes)
                if self._may_move() and has_heard:
                    await self._look()
                await asyncio.sleep(_GATHER_SECONDS)
        finally:
            self.is_active = False

    async def weigh(self) -> Ahead:
        """What would be moved now, and of each model why or why not; nothing is done."""
        return await self._weighed(self._planner.overview())

    async def _weighed(self, world: World) -> Ahead:
        at = self._clock.wall()
        chances, credits = self._forecast.chances(at, WITHIN_SECONDS), self._forecast.credits
        earned, moved = has_earned(self._forecast.score.statements, credits, self.is_active), dict(self._moved)
        return await asyncio.to_thread(ahead, world, chances, earned=earned, credits=credits, moved=moved, objective=self._objective)

    def _may_move(self) -> bool:
        earned = has_earned(self._forecast.score.statements, self._forecast.credits, self.is_active)
        if earned and not self.is_active:
            log.info("the forecast is better than each model's mean rate: snapshots go into free memory ahead of need")
        elif self.is_active and not earned:
            log.warning("the forecast is no better than each model's mean rate any more: nothing moves ahead of need until it is again")
        self.is_active = earned
        return earned

    async def _look(self) -> None:
        now = self._clock.now()
        self._moved = {key: at for key, at in self._moved.items() if at + LEFT_SECONDS > now}
        world = self._planner.overview()
        self._forget_nodes(world.under_way)
        if moves_nothing(world.models):
            return
        plan = await self._weighed(world)
        for action in self._planner.begin(self._still_right(plan.actions)):
            key = action.node, action.digest
            self._moved[key] = self._clock.now()
            if isinstance(action, Stage):
                self._begun[key] = action, plan.terms[action.model].bytes

    def _still_right(self, actions: Iterable[Stage | Drop]) -> list[Stage | Drop]:
        """Without nodes at which something has begun since the world was looked at, or whose models were asked for."""
        actions, world = list(actions), self._planner.overview()
        changed = {getattr(each, "node", "") for each in world.under_way}
        changed |= {each.node for each in actions if each.model not in world.models or not world.demand_of(each.model).idle}
        changed |= {each.node for each in actions if not any(node.address == each.node and node.synced for node in world.nodes)}
        return [each for each in actions if each.node not in changed]

    # --- what comes of it

    def _heard(self, node: Node) -> None:
        if not (self.is_active or self._begun or self._standing):
            return
        in_memory = sum(each.rung >= Rung.MEMORY for each in node.residencies.values()) if node.synced else 0
        if in_memory < self._in_memory.get(node.address, 0):
            self.look_soon()
        self._in_memory[node.address] = in_memory
        for key in [key for key in (*self._begun, *self._standing) if key[0] == node.address and node.synced]:
            stage, size = self._begun[key] if key in self._begun else self._standing[key]
            there = node.residencies.get(stage.snapshot)
            if there is None or there.digest != stage.digest or there.rung < Rung.MEMORY:
                if key in self._standing:
                    self._wasted(key)
            elif key in self._begun and not there.lacks_weights:
                del self._begun[key]
                self.fetched_bytes += size
                if self._is_idle(stage.model):
                    self._standing[key] = stage, size

    def _asked(self, model: str) -> None:
        found = [key for key, (stage, _) in self._standing.items() if stage.model == model]
        for key in found:
            del self._standing[key]
        self.hits += bool(found)

    def _wasted(self, key: Key) -> None:
        _, size = self._standing.pop(key)
        self.wasted_bytes += size
        self._moved[key] = self._clock.now()  # whoever took its room wanted it

    def _forget_nodes(self, under_way: Sequence[Action]) -> None:
        """Those that are not listed any more, and what their agents did not do. What one has answered its stream may say only later."""
        for node in self._nodes:
            self._heard(node)
        listed = {node.address for node in self._nodes}
        self._begun = {key: begun for key, begun in self._begun.items() if begun[0] in under_way}
        self._in_memory = {address: count for address, count in self._in_memory.items() if address in listed}
        for key in [key for key in self._standing if key[0] not in listed]:
            self._wasted(key)

    def _is_idle(self, model: str) -> bool:
        return self._ledger.knows(model) and self._ledger.demand_anywhere(model).idle
