"""Who of some nodes has what: the same answer, however many snapshots are asked for."""

from __future__ import annotations

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, NodeSet, Replica, Residency, World

NAMES = [SnapshotName("ns", f"s{number}") for number in range(100)]


def test_who_has_a_snapshot_in_the_nodes_order() -> None:
    nodes = [
        Node(f"n{k}", residencies={each: Residency(f"{k}", Rung.DISK, i) for i, each in enumerate(NAMES) if i % (k + 1) == 0})
        for k in range(4)
    ]
    world = World(0.0, {}, tuple(nodes))
    for i, name in enumerate(NAMES):
        expected = [(node.address, i) for k, node in enumerate(nodes) if i % (k + 1) == 0]
        assert [(node.address, there.image_bytes) for node, there in world.node_set.having(name)] == expected
    assert world.node_set.having(None) == world.node_set.having(SnapshotName("ns", "none")) == []


def test_replicas_of_a_model() -> None:
    nodes = NodeSet(
        [Node("b", replicas={"r2": Replica("r2", "m"), "r1": Replica("r1", "other")}), Node("a", replicas={"r0": Replica("r0", "m")})]
    )
    assert [(node.address, replica.id) for node, replica in nodes.running("m")] == [("b", "r2"), ("a", "r0")]
    assert nodes.running("none") == [] and NodeSet.of(nodes) is nodes
