"""The planner between the ledger and real agents' streams: when it decides, and that it is done. No root, no CRIU."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.books.trigger import Trigger
from scaler.fleet import executor as executor_module
from scaler.fleet.executor import Executor
from scaler.fleet.nodes import Nodes
from scaler.fleet.planner import Planner
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.plan import copies, policy
from scaler.plan.actions import End, Start
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.scheduling import Standing
from scaler.plan.world import Model, Stored
from tests.worlds.fake_agent import Agent
from tests.worlds.waiting import until

NAME = SnapshotName("ns", "chat")
DISK, MEMORY, STANDBY, PARKED = agent_pb2.RUNG_DISK, agent_pb2.RUNG_MEMORY, agent_pb2.RUNG_STANDBY, agent_pb2.RUNG_PARKED


class Maker:
    """Makes no replicas, and says what it was asked for."""

    def __init__(self) -> None:
        self.started: list[Start] = []

    async def start(self, action: Start) -> None:
        self.started.append(action)
        await asyncio.Event().wait()

    async def end(self, action: End) -> None: ...


class System:
    def __init__(self, model: Model, *agents: Agent, quotas: Mapping[str, int] | None = None) -> None:
        self.ledger = Ledger({"chat": ModelLimits()})
        self.agents = agents
        self.maker = Maker()
        self.dispatcher = Dispatcher(self.ledger)
        self.nodes = Nodes(Readiness(self.dispatcher), Activations())
        self.models = DeclaredModels({"chat": model})
        executor = Executor(self.nodes, self.maker, self.ledger.report_failure)
        self.planner = Planner(self.ledger, self.nodes, self.models, executor, quotas=quotas)
        self.refused: list[tuple[str, str, str]] = []
        self.planner.on_refused(lambda stage, node, why: self.refused.append((stage.model, node, why)), lambda *_: None)

    def staged(self) -> list[tuple[str, agent_pb2.Rung]]:
        return [(agent.name, request.rung) for agent in self.agents for request in agent.staged]


@asynccontextmanager
async def planning(model: Model, *agents: Agent, quotas: Mapping[str, int] | None = None) -> AsyncIterator[System]:
    system = System(model, *agents, quotas=quotas)
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(agent.serve()) for agent in agents]
        stack.push_async_callback(system.dispatcher.close)
        await stack.enter_async_context(system.nodes.follow(*addresses))
        stack.push_async_callback(system.planner.close)
        await until(lambda: [node.synced for node in system.nodes] == [True] * len(agents), "agents are heard")
        yield system


def holding(name: str, rung: agent_pb2.Rung, size: int = 1000, gpu: int = 0) -> Agent:
    agent = Agent(name)
    agent.has("ns", "chat", "d", rung=rung, size=size, gpu=gpu)
    return agent


async def test_a_snapshot_that_a_node_comes_to_have_is_staged_there() -> None:
    late = Agent("late")
    async with planning(Model("chat", NAME), holding("early", DISK), late) as system:
        await until(lambda: system.staged() == [("early", MEMORY)])
        late.has("ns", "chat", "d", rung=DISK)
        await until(lambda: system.staged() == [("early", MEMORY), ("late", MEMORY)])


async def test_what_a_quota_bars_is_told_and_done_when_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    agent = holding("a", DISK)
    agent.has("ns", "other", "e", rung=MEMORY, size=1000)
    async with planning(Model("chat", NAME), agent, quotas={"ns": 1500}) as system:
        for _ in range(3):
            system.planner.consider(["chat"])
        ((model, node, why),) = set(system.refused)
        assert (model, node, system.staged()) == ("chat", "a", []) and "namespace ns" in why
        assert len(system.refused) >= 3 and caplog.text.count("chat is not staged on a: ") == 1
        agent.has("ns", "other", "e", rung=DISK, size=1000)
        await until(lambda: system.staged() == [("a", MEMORY)])


async def test_the_first_request_stages_in_the_same_turn_as_the_push() -> None:
    async with planning(Model("chat", NAME, stage=Rung.DISK), holding("slow", DISK, 10**9), holding("quick", DISK)) as system:
        assert system.staged() == []
        hold = system.dispatcher.hold("chat", "tenant", Priority.NORMAL, 1)
        assert [action.node for action in system.planner.world(["chat"]).under_way] == [address_of(system, "quick")]
        await until(lambda: system.staged() == [("quick", MEMORY)])
        system.dispatcher.leave(hold)


async def test_a_standby_is_made_when_nobody_asks() -> None:
    async with planning(Model("chat", NAME, stage=Rung.STANDBY), holding("a", DISK)) as system:
        # News of the first rung may come after the answer about the second: then the second is asked for once more, which changes nothing.
        await until(lambda: [each for each, _ in itertools.groupby(system.staged())] == [("a", MEMORY), ("a", STANDBY)])


async def test_a_refused_standby_is_asked_for_again_and_memory_all_the_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """One refusal of one rung must not end the staging of a model (it did)."""
    monkeypatch.setattr(executor_module, "_FIRST_STAGE_RETRY_SECONDS", 0.05)
    agent = holding("a", MEMORY)
    agent.refuse = grpc.StatusCode.RESOURCE_EXHAUSTED
    async with planning(Model("chat", NAME, stage=Rung.STANDBY), agent) as system:
        await until(lambda: len(agent.staged) >= 3, "it is asked again by itself")
        agent.refuse = None
        await until(lambda: next(iter(system.nodes)).residencies[NAME].rung is Rung.STANDBY)
        asked = len(agent.staged)
        agent.has("ns", "chat", "d", rung=DISK)
        # News of a rung may come after the answer about the next: then that is asked for once more, which changes nothing.
        await until(lambda: [rung for rung, _ in itertools.groupby(each.rung for each in agent.staged[asked:])] == [MEMORY, STANDBY])


async def test_it_is_parked_rung_by_rung_and_what_is_refused_stays_a_standby_and_says_why() -> None:
    agent = holding("a", DISK)
    agent.refuse_above = STANDBY
    async with planning(Model("chat", NAME, stage=Rung.PARKED), agent) as system:
        await until(lambda: system.planner.world(["chat"]).put_off)
        await until(lambda: next(iter(system.nodes)).residencies[NAME].rung is Rung.STANDBY)
        assert list(dict.fromkeys(system.staged())) == [("a", MEMORY), ("a", STANDBY), ("a", PARKED)]
        (node,) = system.nodes
        assert system.planner.why_no_higher(node, node.residencies[NAME]) == "not parked: no room for it"
        assert list(system.planner.world(["chat"]).put_off) == [(node.address, "d", Rung.PARKED)]


async def test_what_its_agent_has_taken_down_is_not_parked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent made room on a GPU for somebody who has not taken it yet."""
    agent = holding("a", PARKED)
    async with planning(Model("chat", NAME, stage=Rung.PARKED), agent) as system:
        await until(lambda: next(iter(system.nodes)).residencies[NAME].rung is Rung.PARKED)
        agent.has("ns", "chat", "d", rung=STANDBY)
        await until(lambda: next(iter(system.nodes)).residencies[NAME].rung is Rung.STANDBY)
        system.planner.consider(["chat"])
        assert system.staged() == [] and list(system.planner.world(["chat"]).put_off) == [(address_of(system, "a"), "d", Rung.PARKED)]
        monkeypatch.setattr(executor_module, "_FIRST_STAGE_RETRY_SECONDS", 0.05)
        agent.has("ns", "chat", "d", rung=PARKED)
        await until(lambda: next(iter(system.nodes)).residencies[NAME].rung is Rung.PARKED)
        agent.has("ns", "chat", "d", rung=STANDBY)
        await until(lambda: system.staged() == [("a", PARKED)], "it is asked for again by itself")


async def test_the_bound_on_staging_is_its_triggers() -> None:
    agent = Agent("a")
    async with planning(Model("chat", NAME), agent) as system:
        system.planner.triggered(Trigger("chat", max_stage_seconds=1.0))
        agent.has("ns", "chat", "d", rung=DISK, size=5 * 10**9)
        await until(lambda: NAME in next(iter(system.nodes)).residencies)
        assert system.staged() == []
        system.planner.triggered(Trigger("chat"))
        system.planner.consider(["chat"])
        await until(lambda: system.staged() == [("a", MEMORY)])


async def test_wanted_replicas_start_where_the_snapshot_is() -> None:
    async with planning(Model("chat", NAME, replicas=0), Agent("none"), holding("has", MEMORY)) as system:
        system.planner.want("chat", 2)
        await until(lambda: [each.node for each in system.maker.started] == [address_of(system, "has")] * 2)
        system.planner.want("chat", 1)
        assert len(system.planner.world(["chat"]).under_way) == 1


async def test_why_nothing_starts_is_told_to_those_who_wait() -> None:
    async with planning(Model("chat", NAME, replicas=0)) as system:
        system.planner.want("chat", 1)
        assert system.ledger.failure("chat") == "no restore agent is connected"


def address_of(system: System, name: str) -> str:
    return next(node.address for node in system.nodes if node.name == name)


async def test_a_replica_sleeps_when_no_gateway_has_asked_for_its_model_for_a_while() -> None:
    agent = holding("a", MEMORY)
    agent.runs("one", "chat")
    async with planning(Model("chat", NAME, idle=Rung.STANDBY, idle_seconds=0.3), agent) as system:
        system.ledger.add_remote("chat", 0, 1)  # a stream at another gateway
        await asyncio.sleep(0.5)  # longer than it would have been left awake
        assert agent.demoted == []
        system.ledger.add_remote("chat", 0, -1)
        await until(lambda: [each.sleeps for node in system.nodes for each in node.replicas.values()] == [Rung.STANDBY])
        # News of it may come after the answer: then it is asked for once more, which changes nothing.
        assert {(each.replica_id, each.rung) for each in agent.demoted} == {("one", STANDBY)}
        agent.demoted.clear()
        agent.runs("one", "chat")  # it was woken, for whoever asked past the gateways
        await until(lambda: agent.demoted)


async def test_a_request_whose_snapshot_s_node_is_full_has_another_one_fetch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the one that has it, and then up to memory; what refuses is passed over, and its reason is kept."""
    monkeypatch.setattr(policy, "_CRAMPED_SECONDS_ASKED", 0.1)
    full, unfit, free = holding("full", DISK, gpu=30 << 30), Agent("unfit"), Agent("free")
    for number, (agent, gpu) in enumerate([(full, 1 << 30), (unfit, 70 << 30), (free, 60 << 30)], 1):
        agent.gpu, agent.peer_port = gpu, number
    unfit.refuse = grpc.StatusCode.FAILED_PRECONDITION
    unfit.disk_to_memory = 100e9  # it would serve soonest
    async with planning(Model("chat", NAME, stage=Rung.DISK), full, unfit, free) as system:
        assert system.staged() == []
        hold = system.dispatcher.hold("chat", "tenant", Priority.NORMAL, 1)
        # News of a rung may come after the answer about the next: then that is asked for once more, which changes nothing.
        await until(lambda: list(dict.fromkeys(system.staged())) == [("unfit", DISK), ("free", DISK), ("free", MEMORY)])
        assert [(peer.node, peer.complete) for peer in free.staged[0].peers] == [("full", True)]
        there = {node.name: node for node in system.nodes}
        assert system.planner.why_not_fetched(there["unfit"], NAME) == "not fetched: no room for it"
        assert not any(system.planner.why_not_fetched(there[name], NAME) for name in ("full", "free"))
        assert there["free"].rates.remote_to_disk > 0
        system.dispatcher.leave(hold)


async def test_a_gpu_that_others_take_has_the_snapshot_fetched_elsewhere_though_nothing_else_has_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "_CRAMPED_SECONDS", 0.1)
    has, other = holding("a", MEMORY, gpu=30 << 30), Agent("b")
    for number, agent in enumerate([has, other], 1):
        agent.gpu, agent.peer_port = 70 << 30, number
    async with planning(Model("chat", NAME, stage=Rung.MEMORY), has, other) as system:
        has.takes_gpu(60 << 30)
        await until(lambda: [node.gpus[0].free_bytes for node in system.nodes if node.name == "a"] == [60 << 30])
        assert system.staged() == []
        has.takes_gpu(1 << 30)
        await until(lambda: system.staged() == [("b", DISK), ("b", MEMORY)])


async def test_a_cordon_alone_has_the_snapshot_fetched_elsewhere_and_a_node_that_takes_pods_again_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copies, "SHORT_SECONDS", 0.1)
    has, other = holding("a", DISK), Agent("b")
    has.peer_port, other.peer_port = 1, 2
    async with planning(Model("chat", NAME, stage=Rung.DISK, digest="d"), has, other) as system:
        system.nodes.place("b", Standing(cordoned=True))
        system.nodes.place("a", Standing(cordoned=True))
        assert system.staged() == []
        system.nodes.place("b", Standing())
        await until(lambda: system.staged() == [("b", DISK)])


async def test_a_second_copy_comes_from_a_store_when_there_have_been_too_few_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SHORT_SECONDS", 0.1)
    stored = Stored("s3://b/p", "d", 1000)
    model = Model("chat", NAME, stage=Rung.DISK, digest="d", copies=2, stored=stored)
    has, other = holding("a", DISK), Agent("b")
    async with planning(model, has, other) as system:
        await until(lambda: system.staged() == [("b", DISK)])
        assert list(other.staged[0].stores) == ["s3://b/p"]


async def test_a_pod_that_comes_to_a_node_without_its_snapshot_has_that_fetched() -> None:
    holder, other = Agent("a"), Agent("b")
    holder.has("ns", "chat", "d", rung=DISK, cold=60.0)
    holder.peer_port, other.peer_port = 1, 2
    model = Model("chat", NAME, stage=Rung.DISK, digest="d")
    here: list[str] = []
    async with planning(model, holder, other) as system:
        system.planner.arriving_by(lambda model: here)
        system.planner.consider(["chat"])
        here.append("b")
        system.planner.consider(["chat"])
        await until(lambda: system.staged() == [("b", DISK)])


async def test_a_pin_is_told_and_taken_back_and_of_two_models_with_one_snapshot_the_higher_counts() -> None:
    agent = holding("n", MEMORY)
    models = {"chat": Model("chat", NAME, pin=Rung.DISK), "other": Model("other", NAME, pin=Rung.MEMORY)}

    def told() -> list[agent_pb2.Rung]:
        return [request.rung for request in agent.pinned]

    async with planning(models["chat"], agent) as system:
        await until(lambda: told() == [DISK])
        system.models.update(models)
        system.planner.consider(models)
        await until(lambda: [node.residencies[NAME].pinned for node in system.nodes] == [Rung.MEMORY])
        system.planner.consider(models)
        system.models["other"] = Model("other", NAME)
        system.planner.consider(models)
        await until(lambda: told() == [DISK, MEMORY, DISK])
        del system.models["chat"]
        system.planner.keep_changed(NAME)
        await until(lambda: told() == [DISK, MEMORY, DISK, agent_pb2.RUNG_ABSENT])
