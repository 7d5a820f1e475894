"""One model on one machine from the moment 0, in virtual time: the whole scaler but its sockets.

Real: ledger, dispatcher, planner, replicas of one machine, KEDA's service and its rules. Not there: the gateway's HTTP (`Day.ask` does what
it does, in its order), engines (a request is a length of time), and the agent's work (`NodeAgent` says how long it takes). Nothing costs
virtual time but what these say.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc, externalscaler_pb2_grpc

from scaler.books.activation import Activation, Activations
from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.keda.external_scaler import ExternalScaler
from scaler.local.autoscaler import Autoscaler
from scaler.local.config import ModelSection
from scaler.local.deployment import Deployment
from scaler.local.replica_maker import LocalReplicas
from scaler.plan.declared import DeclaredModels
from scaler.programs.wiring import wire
from tests.worlds.in_process import InProcessChannel
from tests.worlds.virtual_time import LoopClock

HOUR, MINUTE = 3600.0, 60.0
MODEL = ModelSection(snapshot="chat", concurrency=8, max_replicas=4, cooldown_seconds=300, polling_seconds=30, stabilisation_seconds=300)
IMAGE, CUDA, HEALTH = 0.25, 0.1, 0.05  # seconds of one restore
RESTORE = IMAGE + CUDA + HEALTH
FIRST_BYTE = 0.05
STAGING, FAILING = 3.0, 0.5
WAKE = {agent_pb2.RUNG_STANDBY: (agent_pb2.ORIGIN_STANDBY, 0.2), agent_pb2.RUNG_PARKED: (agent_pb2.ORIGIN_PARKED, 0.03)}


class NodeAgent(agent_pb2_grpc.AgentServicer):
    """One node with one snapshot, on disk at first. `fails`: so many restores that come fail; `cannot_release`: so many releases.
    `parks`: whether its engine can be parked. Replicas are told by the stream first.
    """

    def __init__(self, clock: LoopClock) -> None:
        self.fails = 0
        self.cannot_release = 0
        self.parks = True
        self.refused: list[float] = []  # when it was asked to park in vain
        self.demoted: list[tuple[float, agent_pb2.Rung]] = []
        self.stood: list[tuple[float, agent_pb2.Rung]] = []  # since when, on which rung
        self.slow: list[float] = []  # seconds by which the next restores take longer
        self.asked = 0  # for restores
        self.staged: list[float] = []
        self.restored: list[float] = []  # when each replica was ready
        self.released: list[float] = []
        self._clock = clock
        self._rung: agent_pb2.Rung = agent_pb2.RUNG_DISK
        self._going_down: asyncio.TimerHandle | None = None
        self._news: asyncio.Queue[agent_pb2.NodeUpdate] = asyncio.Queue()

    async def Watch(self, request: agent_pb2.WatchRequest, context: Any) -> AsyncIterator[agent_pb2.NodeUpdate]:
        node = agent_pb2.NodeUpdate(node=agent_pb2.Node(name="node", memory_free_bytes=1 << 34))
        yield node
        yield self._residency()
        yield agent_pb2.NodeUpdate(synced=True)
        while True:
            try:
                async with asyncio.timeout(5.0):
                    update = await self._news.get()
            except TimeoutError:
                update = node
            yield update

    async def Stage(self, request: agent_pb2.StageRequest, context: Any) -> agent_pb2.StageResponse:
        await self._check_parking(request.rung, context)
        await asyncio.sleep(STAGING)
        self.staged.append(self._clock.now())
        if request.rung > self._rung:
            self.stands(request.rung)
        return agent_pb2.StageResponse(residency=self._residency().residency, seconds=STAGING)

    async def Restore(self, request: agent_pb2.RestoreRequest, context: Any) -> agent_pb2.RestoreResponse:
        self.asked += 1
        if self.fails:
            self.fails -= 1
            await asyncio.sleep(FAILING)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        origin, wake = WAKE.get(self._rung, (agent_pb2.ORIGIN_RESTORED, 0.0))
        if wake:
            self.stands(agent_pb2.RUNG_MEMORY)
        await asyncio.sleep(wake or RESTORE + (self.slow.pop() if self.slow else 0.0))
        self.restored.append(self._clock.now())
        replica = agent_pb2.Replica(
            id=f"r{len(self.restored)}",
            model=request.model,
            state=agent_pb2.REPLICA_READY,
            origin=origin,
            endpoint=agent_pb2.Endpoint(host="127.0.0.1", port=1),
        )
        for name, seconds in (("image.wake", wake),) if wake else (("image", IMAGE), ("cuda", CUDA), ("health", HEALTH)):
            replica.phases.add(name=name, seconds=seconds)
        self._news.put_nowait(agent_pb2.NodeUpdate(replica=replica))  # whoever reads the stream may hear of it before the answer
        await asyncio.sleep(0.001)
        return agent_pb2.RestoreResponse(replica=replica)

    async def Release(self, request: agent_pb2.ReleaseRequest, context: Any) -> agent_pb2.ReleaseResponse:
        self.released.append(self._clock.now())
        if self.cannot_release:
            self.cannot_release -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no descriptor left")
        self._gone(request.replica_id)
        return agent_pb2.ReleaseResponse()

    async def Demote(self, request: agent_pb2.DemoteRequest, context: Any) -> agent_pb2.DemoteResponse:
        await self._check_parking(request.rung, context)
        self.demoted.append((self._clock.now(), request.rung))
        self._gone(request.replica_id)
        kept = {request.rung: request.keep_seconds}
        if request.rung == agent_pb2.RUNG_PARKED:
            kept[agent_pb2.RUNG_STANDBY] = request.standby_seconds
        self._go_down(kept)
        return agent_pb2.DemoteResponse()

    def stands(self, rung: agent_pb2.Rung) -> None:
        """Its snapshot stands on the rung from now on, until something else is asked."""
        if self._going_down:
            self._going_down.cancel()
        self._rung = rung
        self.stood.append((self._clock.now(), rung))
        self._news.put_nowait(self._residency())

    def _go_down(self, kept: dict[agent_pb2.Rung, float]) -> None:
        """Through these rungs, on each for so many seconds."""
        if not kept:
            self.stands(agent_pb2.RUNG_MEMORY)
            return
        rung, seconds = max(kept), kept.pop(max(kept))
        self.stands(rung)
        if seconds:
            self._going_down = asyncio.get_running_loop().call_later(seconds, self._go_down, kept)

    def _gone(self, replica_id: str) -> None:
        gone = agent_pb2.Replica(id=replica_id, model="chat", state=agent_pb2.REPLICA_GONE)
        self._news.put_nowait(agent_pb2.NodeUpdate(replica=gone))

    async def _check_parking(self, rung: agent_pb2.Rung, context: Any) -> None:
        if rung == agent_pb2.RUNG_PARKED and not self.parks:
            self.refused.append(self._clock.now())
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "so much is parked already")

    def _residency(self) -> agent_pb2.NodeUpdate:
        snapshot = agent_pb2.SnapshotRef(namespace="default", name="chat", digest="d")
        return agent_pb2.NodeUpdate(residency=agent_pb2.Residency(snapshot=snapshot, rung=self._rung, image_bytes=1 << 30))


class Day:
    """The scaler of one machine, from the moment 0."""

    def __init__(self, seed: int, model: ModelSection = MODEL) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        chance = random.Random(seed)
        self.agent = NodeAgent(self.clock)
        activations = Activations(self.clock, chance)
        self.ended: list[Activation] = []
        activations.on_end(self.ended.append)
        self.ledger = Ledger({"chat": MODEL.limits}, activations)
        self.parts = wire(
            self.ledger,
            DeclaredModels({"chat": model.model("chat")}),
            maker=lambda nodes, dispatcher: LocalReplicas({"chat": model}, nodes, dispatcher, activations),
            dial=lambda address, tls: InProcessChannel(self.agent, agent_pb2_grpc.add_AgentServicer_to_server),  # type: ignore[return-value]
            clock=self.clock,
            chance=chance,
        )
        self.dispatcher = self.parts.dispatcher
        self.deployment = Deployment("chat", self.parts.planner, MODEL.min_replicas)
        self.scaler = ExternalScaler(self.ledger, activations, self.parts.planner.triggered, clock=self.clock, chance=chance)
        self.wishes: list[tuple[float, int]] = []
        self.answered = 0
        self._stack = AsyncExitStack()

    def replicas(self) -> int:
        return self.deployment.replicas()

    async def scale(self, replicas: int) -> None:
        self.wishes.append((self.clock.now(), replicas))
        await self.deployment.scale(replicas)

    async def __aenter__(self) -> Day:
        enter = self._stack.enter_async_context
        self._stack.push_async_callback(self.dispatcher.close)
        await enter(self.parts.nodes.follow("agent"))
        self._stack.push_async_callback(self.parts.planner.close)
        channel = InProcessChannel(self.scaler, externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server)
        autoscaler = await enter(Autoscaler(channel, self.clock))  # type: ignore[arg-type]
        autoscaler.add("chat", MODEL.trigger("chat"), MODEL.rules, self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.scaler.close()
        await self._stack.aclose()

    async def until(self, moment: float) -> None:
        await asyncio.sleep(moment - self.clock.now())

    async def ask(self, seconds: float) -> None:
        """A request whose answer begins FIRST_BYTE after a replica has it, and lasts `seconds`."""
        arrived = self.clock.now()
        member = self.dispatcher.take("chat")
        if member is None:
            member = await self.dispatcher.hold("chat", "tenant", Priority.NORMAL, 100, arrived=arrived).future
        handed = self.clock.now()
        await asyncio.sleep(FIRST_BYTE)
        self.ledger.activations.answered("chat", handed, self.clock.now())
        await asyncio.sleep(seconds - FIRST_BYTE)
        self.dispatcher.release(member)
        self.answered += 1
