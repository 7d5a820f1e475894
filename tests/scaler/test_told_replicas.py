"""What agents tell of their replicas: how each was made, for which wait, and when it goes."""

from __future__ import annotations

import pytest
from zerowake_proto import agent_pb2

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import nodes as module
from scaler.plan.rungs import Rung
from scaler.plan.world import Residency
from tests.worlds.followed_agents import Agent, View, replica, viewing
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SUCCESSOR_SECONDS", 0.3)


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
