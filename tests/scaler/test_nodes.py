"""Agents that appear and vanish: what that does to the gateway's view of replicas."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import nodes as module
from scaler.fleet.addresses import Addresses
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, Residency
from tests.worlds.certificates import Authority
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.tls import BadCertificate, TlsFiles, server_credentials


class Agent(agent_pb2_grpc.AgentServicer):
    """One that has replicas by these ids, and says nothing more."""

    def __init__(self, name: str, *replicas: str, port: int = 1) -> None:
        self.name = name
        self.replicas = replicas
        self.port = port
        self.watched = 0
        self.speaks = asyncio.Event()  # again and again, as agents do
        self.breaks = asyncio.Event()  # its stream, once

    @asynccontextmanager
    async def serve(self, tls: TlsFiles | None = None) -> AsyncIterator[str]:
        server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(self, server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(tls)) if tls else server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)

    async def Watch(self, request: agent_pb2.WatchRequest, context: Any) -> AsyncIterator[agent_pb2.NodeUpdate]:
        self.watched += 1
        yield agent_pb2.NodeUpdate(node=agent_pb2.Node(name=self.name))
        for name in self.replicas:
            yield agent_pb2.NodeUpdate(replica=replica(name, port=self.port))
        yield agent_pb2.NodeUpdate(synced=True)
        while self.speaks.is_set():
            await asyncio.sleep(0.05)
            yield agent_pb2.NodeUpdate(node=agent_pb2.Node(name=self.name))
        await self.breaks.wait()
        self.breaks.clear()


def replica(name: str, namespace: str = "ns", port: int = 1) -> agent_pb2.Replica:
    return agent_pb2.Replica(
        id=name,
        model="m",
        snapshot=agent_pb2.SnapshotRef(namespace=namespace),
        state=agent_pb2.REPLICA_READY,
        origin=agent_pb2.ORIGIN_COLD,
        endpoint=agent_pb2.Endpoint(host="127.0.0.1", port=port),
    )


class View:
    def __init__(self, admits: Any = lambda _: True, clock: Clock = SYSTEM_CLOCK) -> None:
        ledger = Ledger({"m": ModelLimits()})
        self.dispatcher = Dispatcher(ledger)
        self.activations = Activations(clock)
        self.nodes = Nodes(Readiness(self.dispatcher), self.activations, admits, clock)
        self.addresses = Addresses()

    def ready(self) -> set[str]:
        return {each.id for each in self.dispatcher.ready("m")}

    async def until(self, *names: str, within: float = 10.0) -> None:
        try:
            async with asyncio.timeout(within):
                while self.ready() != set(names):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"replicas are {self.ready()} and not {names}") from None


@asynccontextmanager
async def viewing(*agents: Agent, tls: TlsFiles | None = None, server_tls: TlsFiles | None = None) -> AsyncIterator[tuple[View, list[str]]]:
    view, addresses = View(), []
    async with AsyncExitStack() as stack:
        for agent in agents:
            addresses.append(await stack.enter_async_context(agent.serve(server_tls)))
        view.addresses.set(addresses)
        stack.push_async_callback(view.dispatcher.close)
        await stack.enter_async_context(view.nodes.follow_listed(view.addresses, tls))
        yield view, addresses


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SUCCESSOR_SECONDS", 0.3)


async def test_agents_that_appear_and_vanish() -> None:
    one, two = Agent("n1", "a"), Agent("n2", "b")
    async with viewing(one, two) as (view, addresses):
        await view.until("a", "b")
        view.addresses.set(addresses[1:])
        assert [node.name for node in view.nodes] == ["n2"]
        assert view.ready() == {"a", "b"}  # replicas outlive their agent
        await view.until("b")
        view.addresses.set(addresses)
        await view.until("a", "b")


async def test_a_successor_on_the_same_node_keeps_its_replicas() -> None:
    old, new = Agent("n1", "a", "ended meanwhile"), Agent("n1", "a")
    async with viewing(old, new) as (view, addresses):
        await view.until("a", "ended meanwhile")
        member = view.dispatcher._members["a"]
        view.addresses.set(addresses[1:])
        await view.until("a")
        await asyncio.sleep(0.4)
        assert view.dispatcher._members["a"] is member  # its connections, too


async def test_an_agent_that_is_silent_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.2)
    agent = Agent("n1", "a")
    async with viewing(agent) as (view, _):
        await view.until("a")
        async with asyncio.timeout(5):
            while agent.watched < 3:
                await asyncio.sleep(0.01)
        assert view.ready() == {"a"}


async def test_a_node_at_which_nothing_answers_is_not_counted_on_unless_its_agent_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DOUBT_SECONDS", 0.2)
    silent, speaking = Agent("n1", "a"), Agent("n2", "b")
    speaking.speaks.set()
    async with viewing(silent, speaking) as (view, _):
        await view.until("a", "b")
        await until(lambda: all(node.synced for node in view.nodes))
        lost: list[str] = []
        view.nodes.on_change(lambda node: lost.append(node.name) if node.silent and not node.synced else None)
        for name in ("n1", "n2", "", "unknown"):
            view.nodes.doubt(name)
        await until(lambda: lost)
        await until(lambda: all(node.synced for node in view.nodes))  # asked again, it answers
        assert set(lost) == {"n1"}
        assert not any(node.silent for node in view.nodes)
        assert view.ready() == {"a", "b"}


async def test_one_that_is_being_given_up_is_not_doubted_as_well() -> None:
    async with viewing(Agent("n1", "a")) as (view, _):
        await view.until("a")
        (agent,) = view.nodes._agents.values()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0) as patience:
                await asyncio.Event().wait()
        its_own, agent.patience = agent.patience, patience
        view.nodes.doubt("n1")
        agent.patience = its_own


async def test_the_replicas_of_an_agent_that_is_lost_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.2)
    async with viewing(Agent("n1", "a")) as (view, _):
        await view.until("a")
        await until(lambda: not view.dispatcher._members["a"].takes_requests)  # nothing listens at its port
        assert view.dispatcher._members["a"].backend.node == "n1"


async def test_how_its_replica_was_made_stands_in_the_activation_and_in_the_next_estimate() -> None:
    agent = Agent("n1")
    async with viewing(agent) as (view, addresses):
        await until(lambda: all(node.synced for node in view.nodes))
        activation = view.activations.begin("m")
        told = replica("a")
        told.origin, told.snapshot.digest = agent_pb2.ORIGIN_PARKED, "d"
        told.phases.add(name="image.wake", seconds=0.25)
        for _ in range(2):  # by the answer and by the stream
            view.nodes.learn(addresses[0], told)
        assert (activation.origin, dict(activation.phases)["image"]) == ("parked", 0.25)
        there = view.nodes.agent(addresses[0])
        assert there is not None
        there.settle(SnapshotName("ns", "m"), Residency("d", Rung.PARKED, 1))
        assert there.node.residencies[SnapshotName("ns", "m")].parked_overhead_seconds == 0.25


async def test_a_replica_that_retires_finishes_what_it_has() -> None:
    agent = Agent("n1", "a")
    async with viewing(agent) as (view, _):
        await view.until("a")
        member = view.dispatcher.take("m")
        assert member is not None
        told = replica("a")
        told.state = agent_pb2.REPLICA_RETIRING
        (node,) = view.nodes
        view.nodes.learn(node.address, told)
        assert (view.ready(), view.dispatcher.take("m"), member.gone) == (set(), None, False)
        view.dispatcher.release(member)
        told.state = agent_pb2.REPLICA_GONE
        view.nodes.learn(node.address, told)
        assert member.gone


async def test_another_replica_may_take_the_place_of_one_that_fails() -> None:
    agent = Agent("n1", "a")
    async with viewing(agent) as (view, _):
        await view.until("a")
        told = replica("a")
        told.state = agent_pb2.REPLICA_FAILING
        (node,) = view.nodes
        view.nodes.learn(node.address, told)
        assert (view.ready(), [list(each.replicas) for each in view.nodes]) == (set(), [[]])
        told.state = agent_pb2.REPLICA_READY
        view.nodes.learn(node.address, told)
        assert (view.ready(), [list(each.replicas) for each in view.nodes]) == ({"a"}, [["a"]])


async def test_one_agents_fault_costs_nothing_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    view = View()
    good, odd = Agent("n1", "a"), Agent("n2", "b")

    def fail(node: Node) -> None:
        if node.name == "n2" and node.synced:
            raise RuntimeError("told to fail")

    async with good.serve() as one, odd.serve() as other, view.nodes.follow(one, other):
        view.nodes.on_change(fail)
        async with asyncio.timeout(5):
            while odd.watched < 3:
                await asyncio.sleep(0.01)
        await view.until("a", "b")
        assert (good.watched, "told to fail" in caplog.text) == (1, True)
        await view.dispatcher.close()


async def test_only_those_that_are_admitted() -> None:
    owner = "ns"
    view = View(lambda told: told.namespace == owner)
    agent = Agent("n1", "a")
    async with agent.serve() as address, view.nodes.follow(address):
        await view.until("a")
        owner = "another"
        view.nodes.reconsider("m")
        assert view.ready() == set()
        owner = "ns"
        view.nodes.reconsider("m")
        assert view.ready() == {"a"}
        await view.dispatcher.close()


async def test_what_went_by_before_the_agent_began() -> None:
    """It is the time since the push, less the agent's own, of which an earlier agent says no moments."""
    clock = StandingClock(101.0)
    view = View(clock=clock)
    activation = view.activations.begin("m", 100.0)
    activation.mark("held", 100.1)
    activation.mark("pushed", 100.2)
    agent = Agent("n1")
    async with agent.serve() as address, view.nodes.follow(address):
        (node,) = view.nodes
        told = replica("a")
        for name, seconds in {"image.criu": 0.1, "image.fill": 0.2, "weights": 0.25, "health": 0.05, "unaccounted": 0.05}.items():
            told.phases.add(name=name, seconds=seconds)
        view.nodes.learn(node.address, told)
        assert {name: round(seconds, 6) for name, seconds in activation.phases.items()} == {
            "held": 0.1,
            "pushed": 0.1,
            "scheduled": 0.15,
            "image": 0.3,
            "weights": 0.25,
            "health": 0.05,
        }
        await view.dispatcher.close()


async def test_when_the_agents_phases_were_by_the_clock_of_the_scaler() -> None:
    clock = StandingClock(101.0)
    view = View(clock=clock)
    activation = view.activations.begin("m", 100.0)
    activation.mark("held", 100.1)
    agent = Agent("n1")
    async with agent.serve() as address, view.nodes.follow(address):
        (node,) = view.nodes
        told = replica("a")
        for name, seconds, begins, ends in (
            ("image.sandbox", 0.1, 0.0, 0.1),
            ("staged.pages", 0.05, 0.15, 0.3),
            ("image.criu", 0.1, 0.1, 0.4),
            ("cuda.restore", 0.125, 0.5, 0.625),
            ("unaccounted", 0.125, 0.0, 0.75),
        ):
            told.phases.add(name=name, seconds=seconds, begins=begins, ends=ends)
        view.nodes.learn(node.address, told)
        activation.add("first_byte", 5.0, 101.0)
        found = {name: tuple(round(each, 6) for each in interval) for name, interval in activation.intervals.items()}
        assert list(found.items()) == [
            ("held", (0.0, 0.1, 0.1)),
            ("scheduled", (0.1, 0.25, 0.15)),
            ("image", (0.25, 0.65, 0.2)),
            ("staged", (0.4, 0.55, 0.05)),
            ("cuda", (0.75, 0.875, 0.125)),
            ("first_byte", (1.0, 1.0, 5.0)),  # never outside of the activation, which lasts until now
        ]
        await view.dispatcher.close()


async def test_mutual_tls(tmp_path: Path) -> None:
    authority = Authority("zerowake")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    scaler = TlsFiles(*authority.issue("zerowake-scaler").write(tmp_path, "scaler"), tmp_path / "ca.crt")
    agents = TlsFiles(*authority.issue("zerowake-agent").write(tmp_path, "agent"), tmp_path / "ca.crt")
    agent = Agent("n1", "a")
    async with viewing(agent, tls=scaler, server_tls=agents) as (view, _):
        await view.until("a")
    impostor = Agent("n1", "a")
    async with viewing(impostor, tls=scaler, server_tls=scaler) as (view, _):  # it is of our authority, but no agent
        await asyncio.sleep(1)
        assert (impostor.watched, view.ready()) == (0, set())


async def test_an_agent_that_comes_while_its_channel_cannot_be_made_is_followed_once_it_can() -> None:
    """And whoever is listed beside it at once. It may be gone by then."""
    short, refused = {"a", "b"}, list[str]()

    def dial(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
        if names[address] in short:
            refused.append(address)
            raise BadCertificate("Too many open files")
        return module.dial_agent(address, tls)

    view = View()
    view.nodes = Nodes(Readiness(view.dispatcher), view.activations, dial=dial)
    async with AsyncExitStack() as stack:
        names = {await stack.enter_async_context(Agent(f"node-{name}", name).serve()): name for name in "abc"}
        stack.push_async_callback(view.dispatcher.close)
        await stack.enter_async_context(view.nodes.follow_listed(view.addresses))
        view.addresses.set(names)
        await view.until("c")
        await until(lambda: len(set(refused)) == 2)
        view.addresses.set([address for address, name in names.items() if name != "b"])
        short.clear()
        await view.until("a", "c")


async def test_a_certificate_that_cannot_be_used(tmp_path: Path) -> None:
    view = View()
    with pytest.raises(BadCertificate):
        async with view.nodes.follow_listed(view.addresses, TlsFiles(tmp_path / "a", tmp_path / "b", tmp_path / "c")):
            pass


@pytest.mark.parametrize("leaving", ["delisted", "restarted", "not admitted"])
async def test_an_agent_that_goes_takes_no_answer_along(leaving: str) -> None:
    """Neither a stream nor a request without a first byte, which would be executed twice."""
    owner = "ns"
    async with Engine(held=True) as engine, front() as f:
        agent = Agent("n1", "a", port=engine.port)
        nodes = Nodes(Readiness(f.dispatcher), f.activations, lambda told: told.namespace == owner)
        addresses = Addresses()
        async with agent.serve() as address, nodes.follow_listed(addresses):
            addresses.set([address])
            await until(lambda: f.dispatcher.ready("m"))
            stream, waiting = f.ask("one two", stream=True), f.ask("without a first byte")
            await asyncio.gather(engine.seen.get(), engine.seen.get())
            if leaving == "delisted":
                addresses.set([])
            elif leaving == "restarted":
                agent.replicas = ()
                agent.breaks.set()
            else:
                owner = "another"
                nodes.reconsider("m")
            await until(lambda: not f.dispatcher.ready("m"))
            assert f.dispatcher.in_flight("a") == 2
            engine.say(3)
            answers = await asyncio.gather(stream, waiting)
            assert answers[0].body.count(b"data: ") == 3 and answers[1].text == "without a first byte"
            assert engine.seen.empty() and engine.left.empty()


async def test_an_agent_that_comes_anew_names_a_replica_that_goes_on() -> None:
    async with Engine(held=True) as engine, front(concurrency=1) as f:
        agent = Agent("n1", "a", port=engine.port)
        async with agent.serve() as address, Nodes(Readiness(f.dispatcher), f.activations).follow(address):
            await until(lambda: f.dispatcher.ready("m"))
            first = f.ask("first")
            await engine.seen.get()
            agent.replicas = ()
            agent.breaks.set()
            await until(lambda: not f.dispatcher.ready("m"))
            agent.replicas = ("a",)
            agent.breaks.set()
            await until(lambda: f.dispatcher.ready("m"))
            second = f.ask("second")
            await f.held(1)
            engine.say(2)
            assert [(await first).text, (await second).text, engine.most] == ["first", "second", 1]
