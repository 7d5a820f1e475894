"""What an agent says of its node: how that is shown, and who is told."""

from __future__ import annotations

import pytest
from zerowake_proto import agent_pb2

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.heard import Heard
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.gateway.upstream import Endpoint
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Gpu, Node, Rates, Replica, Residency, Transfer
from tests.worlds import fake_agent
from tests.worlds.waiting import until

NAME = SnapshotName("ns", "chat")


def nodes_alone() -> Nodes:
    """Nodes behind which no gateway stands."""
    return Nodes(Readiness(Dispatcher(Ledger({}))), Activations())


def test_what_waking_a_parked_one_takes_is_smoothed_and_stands_beside_its_rung() -> None:
    agent = Heard("a:1")

    def woken(origin: agent_pb2.Origin, seconds: float, digest: str = "d") -> float:
        told = agent_pb2.Replica(snapshot=agent_pb2.SnapshotRef(digest=digest), origin=origin)
        told.phases.add(name="image.wake", seconds=seconds)
        told.phases.add(name="weights", seconds=9.0)
        agent.note_wake(told)
        agent.settle(NAME, Residency("d", Rung.PARKED, 7))
        return agent.node.residencies[NAME].parked_overhead_seconds

    assert woken(agent_pb2.ORIGIN_STANDBY, 5.0) == woken(agent_pb2.ORIGIN_PARKED, 5.0, "another") == 0.0
    assert woken(agent_pb2.ORIGIN_PARKED, 0.02) == pytest.approx(0.02)
    assert woken(agent_pb2.ORIGIN_PARKED, 0.12) == pytest.approx(0.05)


def test_a_node_is_a_value_that_does_not_change_with_later_news() -> None:
    agent = Heard("a:1")
    gpu = agent_pb2.Gpu(uuid="GPU-1", total_bytes=80, free_bytes=40)
    rates = agent_pb2.Bandwidths(disk_to_memory=1, memory_to_process=2, disk_to_gpu=3, memory_to_gpu=4)
    agent.describe(agent_pb2.Node(name="n", memory_total_bytes=9, memory_free_bytes=5, gpus=[gpu], bandwidths=rates))
    agent.settle(NAME, Residency("d", Rung.DISK, 7, weights_rung=WeightsRung.GPU))
    before = agent.node
    assert (before.name, before.gpus, before.rates) == ("n", (Gpu("GPU-1", 80, 40),), Rates(1, 2, 3, 4))
    assert agent.node is before, "nothing was heard"
    agent.add(Replica("r", "chat"), Endpoint("127.0.0.1", 1))
    agent.settle(NAME, None)
    agent.synced.set()
    assert (before.synced, list(before.replicas), list(before.residencies)) == (False, [], [NAME])
    assert (agent.node.synced, list(agent.node.replicas), list(agent.node.residencies)) == (True, ["r"], [])
    agent.forget("r")
    assert list(agent.node.replicas) == [] and "r" in agent.gone


def test_how_fast_snapshots_come_the_agent_says_and_of_an_older_one_it_is_measured_here() -> None:
    agent = Heard("a:1")
    agent.describe(agent_pb2.Node(name="n"))
    agent.note_fetch(100, 1.0)
    assert (agent.node.rates.remote_to_disk, agent.node.staged_bytes, agent.node.sources) == (100.0, None, ())
    agent.describe(agent_pb2.Node(name="n", staged_bytes=0, bandwidths=agent_pb2.Bandwidths(remote_to_disk=7.0)))
    assert (agent.node.rates.remote_to_disk, agent.node.staged_bytes) == (7.0, 0)


async def test_what_is_on_its_way_is_shown_and_moves_no_plan() -> None:
    nodes, there = nodes_alone(), fake_agent.Agent("n1")
    name = SnapshotName("ns", "far")
    reference = agent_pb2.SnapshotRef(namespace="ns", name="far", digest="d")

    def says(done: int) -> None:
        progress = agent_pb2.TransferProgress(done_bytes=done, total_bytes=10) if done else None
        there.says(agent_pb2.NodeUpdate(transfer=agent_pb2.Transfer(snapshot=reference, rung=agent_pb2.RUNG_DISK, progress=progress)))

    def shown() -> list[int]:
        return [each.done_bytes for node in nodes for each in node.transfers]

    async with there.serve() as address, nodes.follow(address):
        await until(lambda: [node.synced for node in nodes] == [True])
        heard: list[Node] = []
        nodes.on_change(heard.append)
        says(3)
        await until(lambda: shown() == [3])
        says(7)
        await until(lambda: shown() == [7])
        (node,) = nodes
        assert node.transfers == (Transfer(name, "d", Rung.DISK, 7, 10),)
        weights = agent_pb2.Transfer(snapshot=reference, weights_rung=agent_pb2.WEIGHTS_RUNG_GPU)
        weights.progress.done_bytes = 4
        there.says(agent_pb2.NodeUpdate(transfer=weights))
        await until(lambda: shown() == [7, 4])
        assert [each.weights_rung for node in nodes for each in node.transfers] == [None, WeightsRung.GPU]
        says(0)
        await until(lambda: shown() == [4])
        weights.ClearField("progress")
        there.says(agent_pb2.NodeUpdate(transfer=weights))
        await until(lambda: shown() == [])
        assert heard == [], "no plan hangs on how far it is"


async def test_what_a_node_has_is_told_once_it_is_known_whole_and_then_each_change() -> None:
    nodes, there, heard = nodes_alone(), fake_agent.Agent("n1"), list[list[str]]()
    for number in range(100):
        there.has("ns", f"s{number}", "d")
    nodes.on_change(lambda node: heard.append(sorted(name.name for name in node.residencies)))
    async with there.serve() as address, nodes.follow(address):
        await until(lambda: heard)
        assert [len(names) for names in heard] == [100]
        there.loses("ns", "s7")
        await until(lambda: len(heard) == 2)
        assert "s7" not in heard[1]
