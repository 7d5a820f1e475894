"""The state of the whole system, read from a scaler that runs, and served as JSON."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.world import Model
from scaler.programs.wiring import Parts, wire
from scaler.sources.source import Reading
from scaler.sources.watch import SourceState
from scaler.view.reading import StateReader
from scaler.view.state import Phase, Presence, Replicas, ReplicaState, Source, as_json, decoded
from scaler.view.status import serve_in_pod
from tests.worlds.fake_agent import Agent
from tests.worlds.in_process import InProcessChannel
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until

CHAT = Model("chat", SnapshotName("team", "chat"), pin=Rung.DISK, copies=2)
JOBS = SourceState("redis", "the list jobs", Reading(3, replicas=1), 1.5, "")


@asynccontextmanager
async def read_of(agent: Agent, clock: StandingClock, stage: Rung = Rung.MEMORY) -> AsyncIterator[tuple[Parts, StateReader]]:
    """Two models, of which one has a snapshot, and one node."""
    ledger = Ledger({"chat": ModelLimits(), "cold": ModelLimits()}, Activations(clock, random.Random(1)))
    models = DeclaredModels({"chat": replace(CHAT, stage=stage), "cold": Model("cold", replicas=0)})
    parts = wire(
        ledger,
        models,
        dial=lambda address, tls: InProcessChannel(agent, agent_pb2_grpc.add_AgentServicer_to_server),  # type: ignore[return-value]
        clock=clock,
    )
    reader = StateReader(
        "scaler-0",
        ledger=ledger,
        dispatcher=parts.dispatcher,
        nodes=parts.nodes,
        planner=parts.planner,
        models=models,
        next_likely=lambda: {"chat": 90.0, "cold": None},
        missing=str,
        scale=lambda name: (1, 4) if name == "chat" else (None, None),
        owner=lambda name: "team" if name == "chat" else "",
        leads=False,
    )
    async with parts.nodes.follow("agent"):
        await until(lambda: any(node.synced for node in parts.nodes))
        yield parts, reader
        await parts.planner.close()
        await parts.dispatcher.close()


def served(name: str, state: agent_pb2.ReplicaState, origin: agent_pb2.Origin = agent_pb2.ORIGIN_PARKED) -> agent_pb2.Replica:
    return agent_pb2.Replica(
        id=name,
        model="chat",
        snapshot=agent_pb2.SnapshotRef(namespace="team", name="chat"),
        state=state,
        origin=origin,
        endpoint=agent_pb2.Endpoint(host="127.0.0.1", port=1),
        rung=agent_pb2.RUNG_STANDBY if state == agent_pb2.REPLICA_IDLE else agent_pb2.RUNG_UNSPECIFIED,
    )


async def test_models_with_their_demand_and_where_their_snapshots_stand() -> None:
    agent, clock = Agent("node-1"), StandingClock(100.0)
    agent.has("team", "chat", "d1", rung=agent_pb2.RUNG_MEMORY, size=10**9)
    async with read_of(agent, clock) as (parts, reader):
        reader.asked_by(lambda name: [JOBS] if name == "chat" else [])
        parts.ledger.report_failure("cold", "no room")
        chat, cold = (await reader.read()).models
        assert (chat.name, chat.namespace, chat.snapshot, chat.stage, chat.rung, chat.pinned) == (
            "chat",
            "team",
            "team/chat",
            "memory",
            "memory",
            "disk",
        )
        assert (chat.copies, chat.copies_wanted, chat.next_likely_seconds) == (1, 2, 90.0)
        assert chat.seconds_to_serve is not None and 0 < chat.seconds_to_serve < 60
        assert chat.sources == (Source("redis", "the list jobs", 3, 1, 1.5, up=True, fault=None),)
        assert chat.replicas == Replicas(ready=0, draining=0, sleeping=0, wanted=1, limit=4)
        assert (cold.snapshot, cold.rung, cold.copies, cold.seconds_to_serve, cold.namespace) == (None, None, 0, None, None)
        assert (cold.failure, cold.next_likely_seconds, cold.replicas.wanted) == ("no room", None, None)

        parts.ledger.hold("chat", 10)
        (chat, _) = (await reader.read()).models
        assert (chat.held, chat.held_bytes, chat.in_flight, chat.next_likely_seconds) == (1, 10, 0, 0.0), "it is asked for"


async def test_why_a_snapshot_stands_no_higher_and_when_it_is_tried_again() -> None:
    agent, clock = Agent("node-1"), StandingClock(100.0)
    agent.refuse_above = agent_pb2.RUNG_STANDBY
    agent.has("team", "chat", "d1", rung=agent_pb2.RUNG_STANDBY)
    async with read_of(agent, clock, Rung.PARKED) as (parts, reader):
        await until(lambda: parts.planner.world(["chat"]).put_off)
        state = await reader.read()
        assert (state.models[0].rung, state.models[0].refused) == ("standby", "not parked: no room for it")
        (off,) = (each for each in state.plan.put_off if each.do == "stage")
        assert (off.model, off.snapshot, off.node, off.rung, off.why) == ("chat", "team/chat", "node-1", "parked", "no room for it")
        assert off.for_seconds is not None and off.for_seconds > 0


async def test_nodes_with_their_rungs_budgets_and_what_is_on_its_way() -> None:
    agent, clock = Agent("node-1"), StandingClock(100.0)
    agent.has("team", "chat", "d1", rung=agent_pb2.RUNG_MEMORY, size=7)
    agent.has("team", "far", "d2", rung=agent_pb2.RUNG_DISK, size=5, unusable="it is of another driver")
    async with read_of(agent, clock) as (parts, reader):
        far = agent_pb2.SnapshotRef(namespace="team", name="far")
        for done in (1, 3):
            progress = agent_pb2.TransferProgress(done_bytes=done, total_bytes=5)
            agent.says(agent_pb2.NodeUpdate(transfer=agent_pb2.Transfer(snapshot=far, rung=agent_pb2.RUNG_MEMORY, progress=progress)))
            await until(lambda done=done: any(way.done_bytes == done for node in parts.nodes for way in node.transfers))
            clock.moment += 1.0
        here = agent_pb2.Node(name="node-1", memory_total_bytes=100, memory_free_bytes=60, staged_bytes=7, staged_limit_bytes=50)
        here.gpus.add(uuid="GPU-1", total_bytes=9, free_bytes=4, unused_bytes=3, pool_bytes=0)
        here.bandwidths.disk_to_memory = 2e9
        here.sources.add(name="s3://b", fault="403 Forbidden")
        agent.says(agent_pb2.NodeUpdate(node=here))
        await until(lambda: any(node.sources for node in parts.nodes))
        (node,) = as_json((await reader.read()).nodes)
        assert (node["name"], node["address"], node["presence"]) == ("node-1", "agent", "heard")
        assert (node["cordoned"], node["zone"]) == (False, None)
        assert node["memory"] == {"total_bytes": 100, "free_bytes": 60, "staged_bytes": 7, "staged_limit_bytes": 50}
        assert node["rates"]["disk_to_memory"] == 2e9 and node["rates"]["disk_to_gpu"] is None
        assert node["sources"] == [{"name": "s3://b", "rate": None, "fault": "403 Forbidden"}]
        (gpu,) = node["gpus"]
        assert (gpu["model"], gpu["unused_bytes"], gpu["pool_bytes"], gpu["parked_bytes"]) == (None, 3, 0, None)
        (move,) = node["moves"]
        assert move.pop("since") == clock.wall() - 2.0, "as it was heard of first"
        assert move == {"snapshot": "team/far", "above": "disk", "to": "memory", "done_bytes": 3, "total_bytes": 5}
        assert node["rungs"]["memory"] == {"images": 1, "image_bytes": 7, "weights_bytes": 0}
        assert node["rungs"]["disk"] == {"images": 1, "image_bytes": 5, "weights_bytes": 0}
        assert [(each["snapshot"], each["rung"], each["unusable"]) for each in node["copies"]] == [
            ("team/chat", "memory", None),
            ("team/far", "disk", "it is of another driver"),
        ]
        assert node["copies"][1]["seconds_to_serve"] is None


async def test_a_node_that_is_not_heard_any_more() -> None:
    agent, clock = Agent("node-1"), StandingClock(100.0)
    async with read_of(agent, clock) as (parts, reader):
        assert (await reader.read()).nodes[0].presence is Presence.HEARD
        (heard,) = (parts.nodes.agent(node.address) for node in parts.nodes)
        assert heard is not None
        heard.synced.clear()
        assert (await reader.read()).nodes[0].presence is Presence.UNHEARD
        heard.silent = True
        assert (await reader.read()).nodes[0].presence is Presence.SILENT


async def test_replicas_and_how_each_stands() -> None:
    agent, clock = Agent("node-1"), StandingClock(100.0)
    async with read_of(agent, clock) as (parts, reader):
        parts.nodes.learn("agent", served("r1", agent_pb2.REPLICA_READY))
        parts.nodes.learn("agent", served("r2", agent_pb2.REPLICA_IDLE, agent_pb2.ORIGIN_UNSPECIFIED))
        parts.nodes.learn("agent", served("r3", agent_pb2.REPLICA_READY))
        parts.dispatcher.retire("r3")
        parts.nodes.learn("agent", served("r4", agent_pb2.REPLICA_READY))
        parts.dispatcher.remove("r4")
        assert parts.dispatcher.take("chat") is not None
        state = await reader.read()
        assert [(each.id, each.state, each.sleeps, each.in_flight) for each in state.replicas] == [
            ("r1", ReplicaState.READY, None, 1),
            ("r2", ReplicaState.SLEEPING, "standby", 0),
            ("r3", ReplicaState.DRAINING, None, 0),
            ("r4", ReplicaState.UNSERVED, None, 0),
        ]
        assert (state.replicas[0].node, state.replicas[0].origin, state.replicas[0].model) == ("node-1", "parked", "chat")
        assert state.models[0].replicas == Replicas(ready=1, draining=1, sleeping=1, wanted=1, limit=4)


async def test_activations_with_phases_and_what_none_accounts_for() -> None:
    agent, clock = Agent("node-1"), StandingClock(100.0)
    async with read_of(agent, clock) as (parts, reader):
        parts.ledger.hold("chat", 10, arrived=99.5)
        activation = parts.ledger.activations.current("chat")
        assert activation is not None
        for name, begin, seconds in (("image", 100.0, 2.0), ("cuda", 102.0, 0.5), ("thawing", 102.5, 0.25), ("weights", 102.75, 1.0)):
            activation.add(name, seconds, begin)
        clock.moment = 107.0
        (still,) = (await reader.read()).activations
        assert (still.outcome, still.seconds, still.unaccounted_seconds, still.origin) == ("open", 7.5, None, None)
        activation.made("restored")
        parts.ledger.activations.answered("chat", 106.75, clock.now())
        (served,) = (await reader.read()).activations
        assert (served.id, served.outcome, served.reason, served.origin) == (activation.id, "served", None, "restored")
        assert served.phases == (
            Phase("held", 0.0, 0.5),
            Phase("image", 0.5, 2.0),
            Phase("cuda", 2.5, 0.5),
            Phase("thawing", 3.0, 0.25),  # a newer agent's
            Phase("weights", 3.25, 1.0),  # what they took longer than all that
            Phase("first_byte", 7.25, 0.25),
        )
        assert served.unaccounted_seconds == 3.0


async def test_who_leads_says_so() -> None:
    async with read_of(Agent("node-1"), StandingClock(100.0)) as (_, reader):
        leads, ends = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            leads.set()
            await ends.wait()

        task = asyncio.create_task(reader.while_leading(work()))
        await leads.wait()
        assert (await reader.read()).leads
        ends.set()
        await task
        assert not (await reader.read()).leads


async def test_it_is_served_as_json() -> None:
    agent = Agent("node-1")
    for number in range(200):
        agent.has("team", f"s{number}", f"d{number}", rung=agent_pb2.RUNG_DISK)
    name = f"\0zerowake-test-{uuid.uuid4()}"
    async with (
        read_of(agent, StandingClock(100.0)) as (_, reader),
        serve_in_pod(reader.routes, name),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(name)) as client,
        client.get("http://zerowake/state") as response,
    ):
        assert (response.status, response.content_type) == (200, "application/json")
        assert decoded(await response.read()) == await reader.read(), "in pieces, and whole"
