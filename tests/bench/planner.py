"""A plan for 1,000 nodes with 10,000 snapshots, each on three of them: what it takes after one change, and from nothing.

Planner, policy, nodes and executor are the scaler's own, in this process; agents are in it, too, and answer at once, so that what is
measured is the planner. Two copies of each snapshot are wanted, so that any node may be the one for another copy.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.addresses import Addresses
from scaler.plan.ahead import ahead
from scaler.plan.declared import DeclaredModels
from scaler.plan.policy import decide
from scaler.plan.rungs import Rung
from scaler.plan.scheduling import Standing
from scaler.plan.world import Model
from scaler.programs.wiring import wire
from tests.bench.figures import Figure
from tests.worlds.fake_agent import Agent
from tests.worlds.in_process import InProcessChannel
from tests.worlds.processes import resident
from tests.worlds.waiting import until

NODES, SNAPSHOTS, HOLDERS = 1_000, 10_000, 3
LESS = [(250, SNAPSHOTS), (NODES, 2_500)]
ROUNDS = 21
AT_ONCE = 50


class Fleet:
    """Nodes with snapshots on disk, and a scaler that has heard of all of them."""

    def __init__(self, nodes: int, snapshots: int) -> None:
        chance = random.Random(1)
        self.agents = {f"node-{number}:9446": Agent(f"node-{number}") for number in range(nodes)}  # type: ignore[abstract]
        for agent in self.agents.values():
            agent.peer_port = 9447
        names = [f"s{number}" for number in range(snapshots)]
        for name in names:
            for agent in chance.sample(list(self.agents.values()), HOLDERS):
                agent.has("ns", name, name, rung=agent_pb2.RUNG_DISK, size=1 << 30)
        self.before = resident(os.getpid())
        self.ledger = Ledger({name: ModelLimits() for name in names})
        self.models, self.names = DeclaredModels(), names
        self.parts = wire(self.ledger, self.models, dial=self.dial)
        self.listed = Addresses()
        self.stack = AsyncExitStack()

    def dial(self, address: str, _: object) -> grpc.aio.Channel:
        return InProcessChannel(self.agents[address], agent_pb2_grpc.add_AgentServicer_to_server)  # type: ignore[return-value]

    async def __aenter__(self) -> Fleet:
        await self.stack.enter_async_context(self.parts.nodes.follow_listed(self.listed))
        self.stack.push_async_callback(self.parts.planner.close)
        addresses = list(self.agents)
        for end in range(AT_ONCE, len(addresses) + AT_ONCE, AT_ONCE):  # all of them in one loop would keep each other from speaking
            self.listed.set(addresses[:end])
            await until(lambda: all(node.synced for node in self.parts.nodes), "all agents are heard", within=600.0)
        # Not before: while a few nodes are heard there are too few copies of anything, and others would be made.
        self.models.update({name: Model(name, SnapshotName("ns", name), stage=Rung.DISK, copies=2) for name in self.names})
        self.parts.planner.consider(self.models)
        gc.collect()
        self.bytes = resident(os.getpid()) - self.before
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    def first_request(self) -> float:
        """Of one model after the other."""
        return statistics.median(seconds_of(partial(self.ledger.hold, f"s{number}", 1)) for number in range(ROUNDS))

    def news(self) -> float:
        """Of one node after the other: one of its replicas has ended."""
        addresses = list(self.agents)[:ROUNDS]
        return statistics.median(seconds_of(partial(self.parts.nodes.ended, address, "r")) for address in addresses)

    def cordon(self) -> float:
        """Of one node after the other, each taken back before the next."""
        took = []
        for number in range(1, ROUNDS + 1):
            took.append(seconds_of(partial(self.parts.nodes.place, f"node-{number}", Standing(cordoned=True))))
            self.parts.nodes.place(f"node-{number}", Standing())
        return statistics.median(took)

    def from_nothing(self, stage: Rung) -> float:
        """Every snapshot is to stand on that rung."""
        wished = {name: Model(name, model.snapshot, stage=stage, copies=2) for name, model in self.models.items()}
        self.models.update(wished)
        return min(seconds_of(lambda: decide(self.parts.planner.world(self.models))) for _ in range(3))

    def look_ahead(self) -> float:
        """What the forecast would move, by chances drawn, all snapshots on disk and no wish for more."""
        chance = random.Random(2)
        chances, world = {name: chance.random() ** 4 for name in self.names}, self.parts.planner.overview()
        return min(seconds_of(lambda: ahead(world, chances, earned=True)) for _ in range(3))


async def main() -> list[Figure]:
    async with Fleet(NODES, SNAPSHOTS) as fleet:
        first, news = fleet.first_request(), fleet.news()
        gone = seconds_of(lambda: fleet.listed.set(list(fleet.agents)[1:]))
        cordon = fleet.cordon()
        look = fleet.look_ahead()
        nothing, moves = fleet.from_nothing(Rung.DISK), fleet.from_nothing(Rung.MEMORY)
        memory = fleet.bytes
    detail = f"{NODES} nodes, {SNAPSHOTS} snapshots on {HOLDERS} of them each; one core, median of {ROUNDS}"
    figures = [
        Figure("a plan after a model's first request", first * 1e3, "ms", at_most=100.0, detail=detail),
        Figure("a plan after a node's news", news * 1e3, "ms", at_most=100.0, detail=f"{HOLDERS * SNAPSHOTS // NODES} snapshots are there"),
        Figure("a plan after a node has gone", gone * 1e3, "ms", at_most=100.0, detail="once"),
        Figure("a plan after a cordon", cordon * 1e3, "ms", at_most=100.0, detail=f"median of {ROUNDS}"),
        Figure("a plan from nothing: all is where it is to be", nothing, "s", at_most=3.0, detail="the shortest of three"),
        Figure(
            "a plan from nothing: all goes to memory", moves, "s", at_most=3.0, detail=f"{HOLDERS * SNAPSHOTS} actions; shortest of three"
        ),
        Figure("what goes ahead of need, by a forecast of all models", look, "s", detail="once a minute, in a thread; shortest of three"),
        Figure("memory of nodes, models and planner", memory / 1e6, "MB", detail="with the agents' streams, which are in this process"),
    ]
    for nodes, snapshots in LESS:
        async with Fleet(nodes, snapshots) as fleet:
            size = f"{nodes} nodes, {snapshots} snapshots"
            figures.append(Figure(f"{size}: a first request", fleet.first_request() * 1e3, "ms"))
            figures.append(Figure(f"{size}: a node's news", fleet.news() * 1e3, "ms"))
            figures.append(Figure(f"{size}: from nothing, all goes to memory", fleet.from_nothing(Rung.MEMORY), "s"))
    return figures


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin
