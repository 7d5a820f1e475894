"""A model's replicas on this machine, brought to the number that the autoscaler wishes for: what a Deployment is to KEDA.

One task looks at the wish and at what lives or starts, after every change of either; starts and ends run beside it. A start that fails is
tried again with growing pauses, and why it failed is told to the requests that wait. The replica that goes is the one with the least to
do; it first finishes what it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import random

import grpc
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Node, Nodes
from scaler.gateway.dispatcher import Dispatcher
from scaler.local.config import ModelSection
from scaler.plan.planner import Planner
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock, token

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.2, 30.0
_DRAIN_SECONDS = 300.0


class Deployment:
    def __init__(
        self,
        model: str,
        section: ModelSection,
        ledger: Ledger,
        dispatcher: Dispatcher,
        nodes: Nodes,
        planner: Planner,
        activations: Activations,
        clock: Clock = SYSTEM_CLOCK,
        chance: random.Random = SYSTEM_CHANCE,
    ) -> None:
        self._now = clock.now
        self._chance = chance
        self.model = model
        self._section = section
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._nodes = nodes
        self._planner = planner
        self._activations = activations
        self._wish = section.min_replicas
        self._changed = asyncio.Event()
        self._starting: set[asyncio.Task[None]] = set()
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
        self._not_before = -math.inf  # the moment of the next start
        nodes.on_change(lambda _: self._changed.set())

    def replicas(self) -> int:
        """The wish: as with a Deployment, what lives follows it."""
        return self._wish

    async def scale(self, replicas: int) -> None:
        self._wish = replicas
        self._converge()

    async def run(self) -> None:
        """Converges until cancelled."""
        try:
            while True:
                self._converge()
                pause = self._not_before - self._now()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause if pause > 0 else None):
                        await self._changed.wait()
                self._changed.clear()
        finally:
            work = [*self._starting, *self._ending.values()]
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    def _converge(self) -> None:
        live = [(node, replica) for node, replica in self._nodes.replicas_of(self.model) if replica.id not in self._ending]
        missing = self._wish - len(live) - len(self._starting)
        if missing > 0 and self._planner.node_for(self.model) is None:
            self._ledger.report_failure(self.model, "no restore agent is connected")
        elif missing > 0 and self._now() >= self._not_before:
            for _ in range(missing):
                task = asyncio.create_task(self._start(), name=f"starting {self.model}")
                self._starting.add(task)
                task.add_done_callback(self._started)
        elif missing < 0:
            for task in list(self._starting)[:-missing]:
                task.cancel()
                missing += 1
            surplus = sorted(reversed(live), key=lambda each: self._dispatcher.in_flight(each[1].id))
            for node, replica in surplus[: max(0, -missing)]:
                task = self._ending[replica.id] = asyncio.create_task(self._end(node, replica.id), name=f"ending {replica.id}")
                task.add_done_callback(functools.partial(self._ended, replica.id))

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        self._changed.set()

    def _ended(self, replica_id: str, _: asyncio.Task[None]) -> None:
        self._ending.pop(replica_id, None)
        self._changed.set()

    async def _start(self) -> None:
        node = self._planner.node_for(self.model)
        if node is None:
            return
        activation = self._activations.current(self.model)
        request = agent_pb2.RestoreRequest(request_id=token(self._chance, 8), model=self.model)
        if activation:
            request.activation_id = activation.id
            activation.mark("scheduled")
        if snapshot := self._section.snapshot_name:
            request.snapshot.namespace, request.snapshot.name = snapshot.namespace, snapshot.name
        if self._section.command:
            request.cold.CopyFrom(self._engine())
        try:
            answer = await node.stub.Restore(request)
        except grpc.aio.AioRpcError as error:
            self._fail(error.details() or error.code().name)
            return
        self._backoff.reset()
        self._nodes.learn(node, answer.replica)  # the stream will say so too, maybe later
        if answer.fallback_reason:
            log.warning("%s was started cold (%s): %s", self.model, answer.fallback_reason, answer.fallback_detail)

    def _fail(self, why: str) -> None:
        pause = self._backoff.next()
        log.warning("no replica of %s could be started: %s; next try in %.1f s", self.model, why, pause)
        self._ledger.report_failure(self.model, why)
        self._not_before = self._now() + pause

    async def _end(self, node: Node, replica_id: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await self._dispatcher.drain(replica_id)
        request_id, keep = token(self._chance, 8), self._section.keep_seconds
        try:
            if keep is None:
                await node.stub.Release(agent_pb2.ReleaseRequest(request_id=request_id, replica_id=replica_id))
            else:
                await node.stub.Demote(agent_pb2.DemoteRequest(request_id=request_id, replica_id=replica_id, keep_seconds=keep))
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
                log.warning("replica %s could not be ended: %s", replica_id, error.details())

    def _engine(self) -> agent_pb2.Engine:
        section = self._section
        return agent_pb2.Engine(
            command=section.command,
            env=section.engine_env,
            directory=str(section.directory),
            port=section.port or 0,
            health_path=section.health,
            ready_timeout_seconds=section.ready_seconds,
        )
