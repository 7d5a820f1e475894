"""Where a model runs, and which snapshots stand where before anybody asks.

The first honest policy: every snapshot waits on the rung that its model's file names; the first request of a model makes the best node
stage it at once, beside the push to KEDA, so that staging runs while KEDA and the scheduler are busy. The forecast comes later and
moves the same calls ahead of the request. The node is chosen by the one estimate (estimate.py).

A standby is made while nobody asks and no replica lives, and given up half-made when somebody does: the request's own restore is sooner.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Mapping

import grpc
from zerowake_proto import agent_pb2

from scaler.books.ledger import Ledger
from scaler.books.trigger import Trigger
from scaler.fleet.nodes import Node, Nodes
from scaler.local.config import ModelSection
from scaler.plan.estimate import best, seconds_to_serve, seconds_to_stage
from zerowake_shared.clock import SYSTEM_CHANCE, token

log = logging.getLogger(__name__)

_BELOW = {agent_pb2.RUNG_MEMORY: agent_pb2.RUNG_DISK, agent_pb2.RUNG_STANDBY: agent_pb2.RUNG_MEMORY}


class Planner:
    """Hooks into the ledger and the nodes; `close` cancels what it has asked for."""

    def __init__(self, ledger: Ledger, nodes: Nodes, models: Mapping[str, ModelSection], chance: random.Random = SYSTEM_CHANCE) -> None:
        self._chance = chance
        self._ledger = ledger
        self._nodes = nodes
        self._models = models
        self._staging: dict[tuple[str, str, agent_pb2.Rung], asyncio.Task[None]] = {}  # (node, model, the rung that is asked for)
        self._longest_staging: dict[str, float] = {}
        self._failed: set[tuple[str, str, str]] = set()  # (node, model, digest): told once, not tried again
        ledger.on_first_demand(self.stage)
        nodes.on_change(self._waiting_rung)

    def node_for(self, model: str) -> Node | None:
        """The synced node that would serve the model soonest; one without the snapshot where none has it; None: no node is there."""
        synced = [node for node in self._nodes if node.synced.is_set()]
        snapshot = self._models[model].snapshot_name
        if snapshot is not None:
            by_estimate = best({node: seconds_to_serve(node.info, node.residency(snapshot)) for node in synced})
            if by_estimate is not None:
                return by_estimate
        return max(synced, key=lambda node: node.info.memory_free_bytes, default=None)

    def stage(self, model: str) -> None:
        """Asks the best node to stage the model's snapshot into memory, unless it stands there or would take too long."""
        for (_, staged, rung), task in self._staging.items():
            if staged == model and rung == agent_pb2.RUNG_STANDBY:
                task.cancel()
        node = self.node_for(model) if model in self._models else None
        if node is not None:
            self._stage(node, model)

    def triggered(self, trigger: Trigger) -> None:
        """Takes the bound on staging from a model's trigger."""
        self._longest_staging.pop(trigger.model, None)
        if trigger.max_stage_seconds is not None:
            self._longest_staging[trigger.model] = trigger.max_stage_seconds

    async def close(self) -> None:
        tasks = list(self._staging.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _waiting_rung(self, node: Node) -> None:
        for model, section in self._models.items():
            if section.stage == "disk" or not node.synced.is_set():
                continue
            self._stage(node, model)
            if section.stage == "standby" and not self._nodes.replicas_of(model) and not self._ledger.demand_anywhere(model).pending:
                self._stage(node, model, agent_pb2.RUNG_STANDBY)

    def _stage(self, node: Node, model: str, rung: agent_pb2.Rung = agent_pb2.RUNG_MEMORY) -> None:
        """One rung up to `rung`, unless the snapshot stands elsewhere, is on its way, or it was refused before."""
        snapshot = self._models[model].snapshot_name
        residency = node.residency(snapshot) if snapshot else None
        key = (node.address, model, rung)
        if residency is None or residency.rung != _BELOW[rung] or residency.unusable_reason or key in self._staging:
            return
        if (node.address, model, residency.snapshot.digest) in self._failed:
            return
        if rung == agent_pb2.RUNG_MEMORY and seconds_to_stage(node.info, residency) > self._longest_staging.get(model, math.inf):
            return
        name = f"{agent_pb2.Rung.Name(rung)} of {model}"
        task = self._staging[key] = asyncio.create_task(self._ask(node, model, residency.snapshot, rung), name=name)
        task.add_done_callback(lambda _: self._staging.pop(key, None))

    async def _ask(self, node: Node, model: str, snapshot: agent_pb2.SnapshotRef, rung: agent_pb2.Rung) -> None:
        request = agent_pb2.StageRequest(request_id=token(self._chance, 8), snapshot=snapshot, rung=rung)
        try:
            answer = await node.stub.Stage(request)
            where = "a standby" if rung == agent_pb2.RUNG_STANDBY else "memory"
            log.info("%s stands in %s on %s after %.2f s", model, where, node.info.name, answer.seconds)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                self._failed.add((node.address, model, snapshot.digest))
            log.warning("%s could not be staged on %s: %s", model, node.info.name, error.details())
