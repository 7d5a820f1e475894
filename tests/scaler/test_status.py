"""What `zerowake status` is told: models, replicas and activations, on a socket that root alone may use."""

import random
import stat
from pathlib import Path
from typing import Any

import aiohttp
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.local.config import ModelSection
from scaler.local.deployment import Deployment
from scaler.plan.declared import DeclaredModels
from scaler.programs.wiring import Parts, wire
from scaler.sources.watch import Sources
from scaler.view.plan import PlanView
from scaler.view.reading import StateReader
from scaler.view.state import socket_of
from scaler.view.status import serve_status
from tests.worlds.fake_agent import Agent
from tests.worlds.in_process import InProcessChannel
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until

CHAT = ModelSection(snapshot="team/chat", stage="parked")
COLD = ModelSection(command=("serve",), port=80, min_replicas=2, max_replicas=2)


def reader_of(ledger: Ledger, parts: Parts) -> StateReader:
    return StateReader(
        "machine",
        ledger=ledger,
        dispatcher=parts.dispatcher,
        nodes=parts.nodes,
        planner=parts.planner,
        models=DeclaredModels(),
        next_likely=parts.forecasting.next_likely,
        missing=str,
        scale=lambda _: (None, None),
    )


async def _asked(state: Path) -> Any:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket_of(state)))) as client,
        client.get("http://zerowake/") as response,
    ):
        assert response.status == 200
        return await response.json()


async def test_the_page(tmp_path: Path) -> None:
    clock = StandingClock(100.0)
    activations = Activations(clock, random.Random(1))
    ledger = Ledger({"chat": CHAT.limits, "cold": COLD.limits}, activations)
    models, agent = {"chat": CHAT, "cold": COLD}, Agent("node-1")
    agent.has("team", "chat", "d1", rung=agent_pb2.RUNG_DISK, unusable="it is of another driver")
    parts = wire(
        ledger,
        DeclaredModels({"chat": CHAT.model("chat")}),
        dial=lambda address, tls: InProcessChannel(agent, agent_pb2_grpc.add_AgentServicer_to_server),  # type: ignore[return-value]
        clock=clock,
    )
    view = PlanView(parts.planner, DeclaredModels(), parts.forecasting.explained, str, parts.staging_ahead.weigh)
    deployments = {name: Deployment(name, parts.planner, section.min_replicas) for name, section in models.items()}
    async with (
        parts.nodes.follow("agent"),
        Sources(ledger, clock) as sources,
        serve_status(
            tmp_path,
            models,
            deployments,
            ledger,
            parts.dispatcher,
            parts.nodes,
            parts.planner,
            activations,
            sources,
            view,
            reader_of(ledger, parts),
        ),
    ):
        await until(lambda: any(node.synced for node in parts.nodes))
        ledger.report_failure("chat", "no room")
        ledger.hold("chat", 10, arrived=99.5)
        assert stat.S_IMODE(socket_of(tmp_path).stat().st_mode) == 0o600
        told = await _asked(tmp_path)
        assert told == {
            "models": [
                {
                    "name": "chat",
                    "snapshot": "team/chat",
                    "rung": "disk",
                    "pinned": "absent",
                    "unusable": "it is of another driver",
                    "refused": "",
                    "wanted": 0,
                    "ready": 0,
                    "held": 1,
                    "in_flight": 0,
                    "failure": "no room",
                    "sources": [],
                },
                {
                    "name": "cold",
                    "snapshot": "",
                    "rung": "",
                    "pinned": "",
                    "unusable": "",
                    "refused": "",
                    "wanted": 2,
                    "ready": 0,
                    "held": 0,
                    "in_flight": 0,
                    "failure": "",
                    "sources": [],
                },
            ],
            "nodes": [
                {
                    "name": "node-1",
                    "memory_free_bytes": 1 << 34,
                    "memory_total_bytes": 0,
                    "staged_bytes": None,
                    "staged_limit_bytes": None,
                    "gpus": [],
                    "rates": {
                        "disk_to_memory": 0.0,
                        "memory_to_process": 0.0,
                        "disk_to_gpu": 0.0,
                        "memory_to_gpu": 0.0,
                        "remote_to_disk": 0.0,
                    },
                    "sources": [],
                    "transfers": [],
                }
            ],
            "replicas": [],
            "activations": [],
        }
        progress = agent_pb2.TransferProgress(done_bytes=3, total_bytes=10)
        way = agent_pb2.Transfer(snapshot=agent_pb2.SnapshotRef(namespace="team", name="far"), rung=agent_pb2.RUNG_DISK, progress=progress)
        agent.says(agent_pb2.NodeUpdate(transfer=way))
        here = agent_pb2.Node(
            name="node-1", staged_bytes=0, staged_limit_bytes=5, sources=[agent_pb2.SourceState(name="s3://b", fault="403 Forbidden")]
        )
        here.gpus.add(uuid="GPU-1", model="NVIDIA H200", total_bytes=9, free_bytes=4, unused_bytes=3, pool_bytes=0)
        agent.says(agent_pb2.NodeUpdate(node=here))
        await until(lambda: any(node.sources and node.transfers for node in parts.nodes))
        (node,) = (await _asked(tmp_path))["nodes"]
        assert node["transfers"] == [{"snapshot": "team/far", "rung": "disk", "weights_rung": None, "done_bytes": 3, "total_bytes": 10}]
        assert (node["staged_bytes"], node["staged_limit_bytes"], node["sources"]) == (
            0,
            5,
            [{"name": "s3://b", "rate": 0.0, "fault": "403 Forbidden"}],
        )
        (gpu,) = node["gpus"]
        assert (gpu["model"], gpu["unused_bytes"], gpu["pool_bytes"], gpu["others_bytes"]) == ("NVIDIA H200", 3, 0, None)

        endpoint = agent_pb2.Endpoint(host="127.0.0.1", port=1)
        snapshot = agent_pb2.SnapshotRef(namespace="team", name="chat")
        replica = agent_pb2.Replica(
            id="r1", model="chat", snapshot=snapshot, state=agent_pb2.REPLICA_READY, origin=agent_pb2.ORIGIN_PARKED, endpoint=endpoint
        )
        ledger.leave("chat", 10)
        parts.nodes.learn("agent", replica)
        member = parts.dispatcher.take("chat")
        assert member is not None
        clock.moment = 101.0
        activations.answered("chat", 100.75, clock.now())
        told = await _asked(tmp_path)
        assert told["replicas"] == [{"id": "r1", "model": "chat", "node": "node-1", "origin": "parked", "in_flight": 1, "detail": ""}]
        assert (told["models"][0]["ready"], told["models"][0]["in_flight"], told["models"][0]["failure"]) == (1, 1, "")
        assert told["activations"] == [
            {
                "id": activations.recent(1)[0].id,
                "model": "chat",
                "began": 99.5,
                "outcome": "served",
                "reason": "",
                "origin": "parked",
                "seconds": 1.5,
                "phases": {"held": 0.5, "scheduled": 0.0, "first_byte": 0.25, "unaccounted": 0.75},
            }
        ]

        agent.refuse_above = agent_pb2.RUNG_STANDBY
        agent.has("team", "chat", "d1", rung=agent_pb2.RUNG_STANDBY)
        parts.dispatcher.release(member)
        parts.nodes.ended("agent", "r1")
        await until(lambda: parts.planner.world(["chat"]).put_off)
        told = await _asked(tmp_path)
        assert (told["models"][0]["rung"], told["models"][0]["refused"]) == ("standby", "not parked: no room for it")
        await parts.planner.close()
        await parts.dispatcher.close()
    assert not socket_of(tmp_path).exists()
