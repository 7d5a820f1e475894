"""Agents that appear and vanish: what that does to the gateway's view of replicas."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from scaler.fleet import nodes as module
from scaler.fleet.addresses import Addresses
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.plan.world import Node
from tests.worlds.certificates import Authority
from tests.worlds.echo_engine import Engine
from tests.worlds.followed_agents import Agent, View, viewing
from tests.worlds.front import front
from tests.worlds.waiting import until
from zerowake_shared.tls import BadCertificate, TlsFiles


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
