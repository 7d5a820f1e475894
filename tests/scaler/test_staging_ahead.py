"""Bytes that move ahead of need on nodes' agents, by a forecast that has earned it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from zerowake_proto import agent_pb2

from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import staging_ahead as staging_ahead_module
from scaler.forecast.forecast import Forecast
from scaler.forecast.state_file import save
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.scheduling import Standing
from scaler.plan.world import Model
from scaler.programs import forecasting as forecasting_module
from scaler.programs.wiring import Parts, wire
from scaler.view.metrics import AheadCollector
from tests.worlds.fake_agent import Agent
from tests.worlds.waiting import until
from zerowake_shared.background import beside

DISK, MEMORY = agent_pb2.RUNG_DISK, agent_pb2.RUNG_MEMORY
SELDOM, OFTEN = 7200.0, 900.0  # seconds from one request to the next


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at once, each time that something has changed; and many a minute's."""
    monkeypatch.setattr(staging_ahead_module, "_GATHER_SECONDS", 0.01)
    monkeypatch.setattr(forecasting_module, "_PAUSE_SECONDS", 0.05)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two days have taught of three models, of which two are asked for often, until now."""
    file, forecast = tmp_path_factory.mktemp("learned") / "forecast", Forecast()
    begin = (now := time.time()) - 2 * 86_400.0
    every = {"chat": OFTEN, "mail": OFTEN, "seldom": SELDOM}
    for model in every:
        forecast.declare(model, begin)
    for minute in range(1, 2 * 1440 + 1):
        at = begin + 60.0 * minute
        forecast.judge(at)
        for model, seconds in every.items():
            if (60.0 * minute) % seconds == 0 and at < now - 600.0:
                forecast.began(model, at + 1.0)
                forecast.ended(model, at + 5.0)
    save(file, forecast.state())
    return file


@asynccontextmanager
async def scaling(
    file: Path | None,
    *agents: Agent,
    stage: Rung = Rung.DISK,
    servers: dict[str, AsyncExitStack] | None = None,
    objective: str = "mean",
) -> AsyncIterator[Parts]:
    """A scaler of models whose owners want them on this rung, and of its agents, all of which are heard. servers: takes what each of them
    is ended by, by their names."""
    names = ["chat", "mail", "seldom"]
    ledger = Ledger({name: ModelLimits() for name in names})
    models = DeclaredModels({name: Model(name, SnapshotName("ns", name), stage) for name in names})
    parts = wire(ledger, models, forecast_file=file, objective=objective)
    async with AsyncExitStack() as stack:
        addresses = []
        for agent in agents:
            server = await stack.enter_async_context(AsyncExitStack())
            addresses.append(await server.enter_async_context(agent.serve()))
            if servers is not None:
                servers[agent.name] = server
        stack.push_async_callback(parts.dispatcher.close)
        await stack.enter_async_context(parts.nodes.follow(*addresses))
        stack.push_async_callback(parts.planner.close)
        await until(lambda: [node.synced for node in parts.nodes] == [True] * len(agents), "agents are heard")
        await stack.enter_async_context(beside(parts.staging_ahead.run(), "staging ahead"))
        await stack.enter_async_context(beside(parts.forecasting.run(), "forecast"))
        yield parts


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One for each time that it was asked whether anything may move."""
    asked: list[object] = []
    honest = staging_ahead_module.has_earned

    def has_earned(statements: int, credits: dict[str, float], before: bool) -> bool:
        asked.append(statements)
        return honest(statements, credits, before)

    monkeypatch.setattr(staging_ahead_module, "has_earned", has_earned)
    return asked


async def looked(looks: list[object], times: int = 4) -> None:
    """So many looks on: what was to come of the first has come."""
    wanted = len(looks) + times
    await until(lambda: len(looks) >= wanted, "it is looked at")


def holding(name: str, *models: str, rung: agent_pb2.Rung = DISK) -> Agent:
    agent = Agent(name)
    for model in models:
        agent.has("ns", model, model, rung=rung)
    return agent


def staged(*agents: Agent) -> list[tuple[str, str]]:
    return [(agent.name, request.snapshot.name) for agent in agents for request in agent.staged]


def copied(learned: Path, folder: Path) -> Path:
    """A state file of this scaler's own, which it writes anew."""
    (folder / "forecast").write_bytes(learned.read_bytes())
    return folder / "forecast"


def numbers(parts: Parts) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(AheadCollector(parts.staging_ahead))
    lines = (line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if not line.startswith("#"))
    return {name.removeprefix("zerowake_ahead_"): float(value) for name, value in lines if not name.endswith("_created")}


async def test_with_credit_it_stages_before_the_request_which_then_is_a_hit(learned: Path, tmp_path: Path) -> None:
    agent = holding("a", "chat")
    async with scaling(copied(learned, tmp_path), agent) as parts:
        await until(lambda: numbers(parts)["fetched_bytes_total"] == 1000)
        assert staged(agent) == [("a", "chat")] and not agent.staged[0].urgent
        assert numbers(parts) == {"active": 1, "fetched_bytes_total": 1000, "wasted_bytes_total": 0, "hits_total": 0}
        parts.dispatcher.leave(parts.dispatcher.hold("chat", "tenant", Priority.NORMAL, 1))
        parts.dispatcher.leave(parts.dispatcher.hold("chat", "tenant", Priority.NORMAL, 1))
        assert numbers(parts)["hits_total"] == 1, "the second one finds what the first has used"
        agent.has("ns", "chat", "chat", rung=DISK)
        await until(lambda: not any(each.rung >= Rung.MEMORY for node in parts.nodes for each in node.residencies.values()))
        assert numbers(parts)["wasted_bytes_total"] == 0
    assert staged(agent) == [("a", "chat")]


async def test_what_leaves_memory_unused_is_wasted_and_is_left_for_a_while(learned: Path, tmp_path: Path, looks: list[object]) -> None:
    agent = holding("a", "chat")
    async with scaling(copied(learned, tmp_path), agent) as parts:
        await until(lambda: numbers(parts)["fetched_bytes_total"] == 1000)
        agent.has("ns", "chat", "chat", rung=DISK)
        await until(lambda: numbers(parts)["wasted_bytes_total"] == 1000)
        await looked(looks)
    assert staged(agent) == [("a", "chat")]


async def test_without_credit_nothing_moves(looks: list[object]) -> None:
    agent = holding("a", "chat", "mail")
    async with scaling(None, agent) as parts:
        await looked(looks)
        assert numbers(parts)["active"] == 0
        assert "has not shown" in (await parts.staging_ahead.weigh()).terms["chat"].why
    assert staged(agent) == []


async def test_what_owners_want_in_memory_is_the_policy_s(learned: Path, tmp_path: Path, looks: list[object]) -> None:
    agent = holding("a", "chat", rung=MEMORY)
    async with scaling(copied(learned, tmp_path), agent, stage=Rung.MEMORY) as parts:
        await looked(looks)
        assert numbers(parts)["active"] == 1
    assert staged(agent) == [] and agent.unstaged == []


async def test_credit_that_is_gone_is_told_once_and_nothing_moves_any_more(
    learned: Path, tmp_path: Path, looks: list[object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, staging_ahead_module.__name__)
    agent = holding("a", "chat")
    async with scaling(copied(learned, tmp_path), agent) as parts:
        await until(lambda: numbers(parts)["fetched_bytes_total"] == 1000)
        monkeypatch.setattr(Forecast, "credits", property(lambda forecast: {"chat": -1.0}))
        await until(lambda: numbers(parts)["active"] == 0)
        agent.has("ns", "mail", "mail", rung=DISK)
        await looked(looks)
    assert staged(agent) == [("a", "chat")]
    told = [record.message for record in caplog.records if record.name == staging_ahead_module.__name__]
    assert len(told) == 2 and "is better than" in told[0] and "nothing moves ahead of need until it is again" in told[1]


async def test_a_cordoned_node_is_planned_around(learned: Path, tmp_path: Path, looks: list[object]) -> None:
    has, cordoned, other = holding("a", "chat", rung=MEMORY), holding("b", "chat"), holding("c", "chat")
    async with scaling(copied(learned, tmp_path), has, cordoned, other) as parts:
        parts.nodes.place("b", Standing(cordoned=True))
        await looked(looks)
        assert staged(has, cordoned, other) == [], "it needs no second copy"
        parts.nodes.place("a", Standing(cordoned=True))
        await until(lambda: staged(has, cordoned, other) == [("c", "chat")])


async def test_a_node_that_refuses_is_planned_around(learned: Path, tmp_path: Path) -> None:
    """Its disk is full, say."""
    full, other = holding("a", "chat"), Agent("b")
    full.refuse = grpc.StatusCode.RESOURCE_EXHAUSTED
    async with scaling(copied(learned, tmp_path), full, other):
        await until(lambda: staged(full) == [("a", "chat")])
        other.has("ns", "chat", "chat", rung=DISK)
        await until(lambda: staged(other) == [("b", "chat")])
    assert staged(full) == [("a", "chat")], "and is not asked again at once"


async def test_a_node_that_dies_is_planned_around(learned: Path, tmp_path: Path, looks: list[object]) -> None:
    dies, other = holding("a", "chat", rung=MEMORY), holding("b", "chat")
    servers: dict[str, AsyncExitStack] = {}
    async with scaling(copied(learned, tmp_path), dies, other, servers=servers):
        await looked(looks)
        assert staged(dies, other) == []
        await servers["a"].aclose()
        await until(lambda: staged(dies, other) == [("b", "chat")])


async def test_a_scaler_that_restarts_stages_nothing_again(learned: Path, tmp_path: Path, looks: list[object]) -> None:
    one, two = holding("a", "chat", "mail"), holding("b", "chat", "mail")
    file = copied(learned, tmp_path)
    async with scaling(file, one, two) as parts:
        await until(lambda: numbers(parts)["fetched_bytes_total"] == 2000)
    before = staged(one, two)
    async with scaling(file, one, two) as parts:
        await looked(looks)
        assert numbers(parts)["active"] == 1
    assert staged(one, two) == before and len(before) == 2


async def test_a_waiting_request_comes_first(learned: Path, tmp_path: Path, looks: list[object]) -> None:
    agent = holding("a", "chat", "mail")
    async with scaling(copied(learned, tmp_path), agent) as parts:
        hold = parts.dispatcher.hold("chat", "tenant", Priority.NORMAL, 1)
        await until(lambda: staged(agent) == [("a", "chat")])
        assert agent.staged[0].urgent
        await looked(looks)
        assert staged(agent) == [("a", "chat")], "nothing else goes onto that node while it waits"
        parts.dispatcher.leave(hold)
        await until(lambda: staged(agent) == [("a", "chat"), ("a", "mail")])


async def test_what_is_worth_less_leaves_for_it(learned: Path, tmp_path: Path) -> None:
    agent = holding("a", "chat")
    agent.has("ns", "seldom", "seldom", rung=MEMORY)
    agent.staged_limit = 1500
    async with scaling(copied(learned, tmp_path), agent) as parts:
        await until(lambda: numbers(parts)["fetched_bytes_total"] == 1000)
        assert [(each.snapshot.name, each.rung) for each in agent.unstaged] == [("seldom", DISK)]
        await until(lambda: not parts.planner.overview().under_way, "the agent has answered, too")
        terms = (await parts.staging_ahead.weigh()).terms
        assert "it stands in memory" in terms["chat"].why and "moved on a a while ago" in terms["seldom"].why
    assert staged(agent) == [("a", "chat")], "and it is left there"


async def test_weights_leave_for_weights_that_are_worth_more(learned: Path, tmp_path: Path) -> None:
    agent = Agent("a")
    agent.has("ns", "chat", "chat", rung=DISK, weights=5000)
    agent.has("ns", "seldom", "seldom", rung=MEMORY, weights=5000)
    agent.weights_room = 0
    async with scaling(copied(learned, tmp_path), agent) as parts:
        await until(lambda: numbers(parts)["fetched_bytes_total"] == 6000)
    assert [(each.snapshot.name, each.rung, each.weights) for each in agent.unstaged] == [("seldom", DISK, True)]


@pytest.mark.parametrize(("objective", "first"), [("mean", "chat"), ("p99", "mail")])
async def test_what_it_is_to_better_says_which_goes_first(learned: Path, tmp_path: Path, objective: str, first: str) -> None:
    """Both are asked for as often, and mail is a hundred times as large."""
    agent = Agent("a")
    agent.has("ns", "chat", "chat", rung=DISK, size=10**9)
    agent.has("ns", "mail", "mail", rung=DISK, size=10**11)
    async with scaling(copied(learned, tmp_path), agent, objective=objective) as parts:
        terms = (await parts.staging_ahead.weigh()).terms
        assert max(terms.values(), key=lambda each: each.worth).model == first
