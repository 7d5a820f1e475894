"""What `zerowake plan` is told, of a live planner and an agent that refuses, is at work, or has what it is to have."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import grpc
import pytest
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.world import Model
from scaler.programs.wiring import Parts, wire
from scaler.view.plan import PlanView
from scaler.view.status import serve_in_pod
from tests.worlds.fake_agent import Agent
from tests.worlds.in_process import InProcessChannel
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until

NAME = SnapshotName("team", "chat")
DISK, MEMORY = agent_pb2.RUNG_DISK, agent_pb2.RUNG_MEMORY


@asynccontextmanager
async def viewed(agent: Agent, quotas: dict[str, int] | None = None, **model: Any) -> AsyncIterator[tuple[Parts, PlanView]]:
    models = DeclaredModels({"chat": Model("chat", NAME, **model), "cold": Model("cold", replicas=0)})
    clock = StandingClock(100.0)
    parts = wire(
        Ledger({name: ModelLimits() for name in models}),
        models,
        dial=lambda address, tls: InProcessChannel(agent, agent_pb2_grpc.add_AgentServicer_to_server),  # type: ignore[return-value]
        clock=clock,
        memory_quotas=quotas,
    )
    async with parts.nodes.follow("agent"):
        await until(lambda: any(node.synced for node in parts.nodes))
        yield parts, PlanView(parts.planner, models, parts.forecasting.explained, lambda: "", parts.staging_ahead.weigh)
        await parts.planner.close()


async def test_what_a_quota_has_no_room_for() -> None:
    agent = Agent("node-1")
    agent.has("team", "chat", "d1", rung=DISK, size=10**9)
    async with viewed(agent, quotas={"team": 10**9 - 1}, stage=Rung.MEMORY) as (_, plan):
        (stands,) = plan.page()["models"][0]["stands"]
        assert "may hold 953 MiB of namespace team ahead of requests" in stands["why"]
        told = plan.why("chat")
        assert told and told["stands"] == [stands] and told["would_do"] == []


async def test_what_stands_where_and_that_its_owner_wishes_so() -> None:
    agent = Agent("node-1")
    agent.has("team", "chat", "d1", rung=DISK, size=10**9)
    async with viewed(agent, stage=Rung.DISK) as (_, plan):
        assert plan.page() == {
            "missing": "",
            "models": [
                {
                    "name": "chat",
                    "snapshot": "team/chat",
                    "stage": "disk",
                    "pin": "",
                    "copies": 1,
                    "replicas_wanted": None,
                    "stands": [
                        {
                            "node": "node-1",
                            "rung": "disk",
                            "weights": "",
                            "seconds": pytest.approx(1.3),
                            "why": "its owner wishes it so (stage: disk)",
                        }
                    ],
                },
                {"name": "cold", "snapshot": "", "stage": "memory", "pin": "", "copies": 1, "replicas_wanted": 0, "stands": []},
            ],
            "under_way": [],
            "put_off": [],
            "would_do": [],
        }


async def test_what_is_refused_is_put_off_and_says_why() -> None:
    agent = Agent("node-1")
    agent.has("team", "chat", "d1", rung=DISK)
    agent.refuse = grpc.StatusCode.RESOURCE_EXHAUSTED
    async with viewed(agent) as (parts, plan):
        await until(lambda: parts.planner.world(["chat"]).put_off)
        page = plan.page()
        (put_off,) = page["put_off"]
        assert 20 < put_off.pop("for_seconds") < 40
        assert put_off == {
            "do": "stage",
            "snapshot": "team/chat",
            "digest": "d1",
            "node": "node-1",
            "rung": "memory",
            "why": "no room for it",
        }
        assert page["models"][0]["stands"][0]["why"] == "not in memory: no room for it"
        why = plan.why("chat")
        assert why is not None and why["looks_again_in_seconds"] == why["put_off"][0]["for_seconds"]


async def test_a_look_does_nothing_and_says_what_would_be_done() -> None:
    agent = Agent("node-1")
    agent.has("team", "chat", "d1", rung=DISK)
    async with viewed(agent, stage=Rung.DISK) as (parts, plan):
        models = plan._models
        models["chat"] = Model("chat", NAME)
        done = {"do": "stage", "model": "chat", "node": "node-1", "rung": "memory", "why": "its snapshot waits in memory"}
        assert (plan.page()["would_do"], plan.page()["would_do"], agent.staged) == ([done], [done], [])
        parts.planner.consider(["chat"])
        page = plan.page()
        assert (page["would_do"], page["under_way"]) == ([], [done])
        assert page["models"][0]["stands"][0]["why"] == "on its way: its snapshot waits in memory"
        await until(lambda: agent.staged)


async def test_every_term_of_one_model() -> None:
    agent = Agent("node-1")
    agent.has("team", "chat", "d1", rung=DISK, size=10**9)
    async with viewed(agent, stage=Rung.DISK) as (parts, plan):
        found = plan.why("chat")
        assert found is not None
        assert found["demand"] == {"held": 0, "in_flight": 0, "elsewhere": 0, "replicas": 0, "unknown": ""}
        assert found["nodes"] == [
            {
                "node": "node-1",
                "bytes": 10**9,
                "image_bytes": 10**9,
                "seconds_to_serve": pytest.approx(1.3),
                "seconds_to_stage": pytest.approx(1.0),
                "seconds_saved_in_memory": pytest.approx(1.0),
                "memory_staged_bytes": None,
                "memory_limit_bytes": None,
            }
        ]
        assert 0 < found["chance"]["chance"] < 1 and found["chance"]["within_seconds"] == 600.0
        parts.ledger.hold("chat", 1)
        found = plan.why("chat")
        assert found is not None and found["demand"]["held"] == 1
        assert [each["why"] for each in found["under_way"]] == ["requests wait for it"]
        await until(lambda: agent.staged)
        assert plan.why("nobody") is None


async def test_why_a_snapshot_is_of_no_use_on_a_node() -> None:
    agent = Agent("node-1")
    agent.gpu = 1 << 30
    agent.has("team", "chat", "d1", rung=MEMORY, gpu=10 << 30)
    async with viewed(agent) as (_, plan):
        (there,) = plan.page()["models"][0]["stands"]
        assert (there["seconds"], there["why"]) == (None, "its GPUs have no room for it now")
        agent.has("team", "chat", "d1", rung=MEMORY, unusable="it is of another driver")
        await until(lambda: plan.page()["models"][0]["stands"][0]["why"] == "it is of another driver")


async def test_a_scaler_in_a_pod_is_asked_by_a_socket_that_is_no_file() -> None:
    name = f"\0zerowake-test-{uuid.uuid4()}"
    async with (
        viewed(Agent("node-1"), stage=Rung.DISK) as (_, plan),
        serve_in_pod(plan.routes, name),
        serve_in_pod(plan.routes, name),  # another scaler, which leaves it to the first
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(name)) as client,
    ):
        async with client.get("http://zerowake/plan") as response:
            page = await response.json()
            assert ([each["name"] for each in page["models"]], page["would_move_ahead"]) == (["chat", "cold"], [])
        async with client.get("http://zerowake/plan/chat") as response:
            terms = (await response.json())["ahead"]
            assert (terms["decision"], terms["node"], terms["bytes"]) == ("nothing", "", 0) and 0 < terms["chance"] < 1
            assert (terms["worth"], terms["objective"]) == (0.0, {"hits": 1.0, "mean": 1.0, "tail": 0.0})
            assert terms["why"] == "the forecast has not shown that it is better than each model's mean rate: it moves nothing"
        async with client.get("http://zerowake/plan/a%2Fb") as response:
            assert (response.status, await response.json()) == (404, {"unknown": "a/b", "known": ["chat", "cold"]})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
async def test_it_answers_nobody_else() -> None:
    name = f"\0zerowake-test-{uuid.uuid4()}"
    asks = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1]); "
        "s.sendall(b'GET /plan HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n'); print(s.recv(100).split()[1].decode())"
    )
    async with viewed(Agent("node-1"), stage=Rung.DISK) as (_, plan), serve_in_pod(plan.routes, name):
        process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", asks, name[1:], stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert out.decode().strip() == "403"
