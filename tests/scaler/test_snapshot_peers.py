"""From whom a node can fetch a snapshot."""

import pytest
from zerowake_proto import agent_pb2

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.messages import peer_address
from scaler.fleet.snapshot_peers import SnapshotPeer, peers_of
from scaler.plan.actions import Stage
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, Residency

NAME = SnapshotName("ns", "chat")
HAS = {NAME: Residency("d", Rung.MEMORY, 100)}
WANTED = Stage("a", "chat", NAME, "d", Rung.MEMORY, "a request waits")


def node(address: str, residencies: dict[SnapshotName, Residency] | None = None, *, synced: bool = True, serves: bool = True) -> Node:
    return Node(address, f"node-{address}", synced=synced, residencies=residencies or {}, peer_address=f"{address}:9447" if serves else "")


def peer(address: str, complete: bool) -> SnapshotPeer:
    return SnapshotPeer(f"node-{address}", f"{address}:9447", complete)


def test_those_that_have_it_and_those_that_are_told_to_fetch_it() -> None:
    under_way = [WANTED, Stage("c", "chat", NAME, "d", Rung.STANDBY, ""), Stage("d", "chat", NAME, "another", Rung.MEMORY, "")]
    found = peers_of(WANTED, [node("a"), node("b", HAS), node("c"), node("d"), node("e")], under_way)
    assert found == (peer("b", True), peer("c", False))


def test_a_node_that_has_it_is_told_of_nobody() -> None:
    assert peers_of(WANTED, [node("b", HAS), node("a", HAS)], [WANTED]) == ()


@pytest.mark.parametrize(
    "other",
    [
        node("b", HAS, serves=False),
        node("b", HAS, synced=False),
        node("b", {NAME: Residency("older", Rung.MEMORY, 100)}),
        node("b", {NAME: Residency("d", Rung.DISK, 100, unusable="it is damaged")}),
        node("b"),
    ],
    ids=["serves nobody", "lost", "another snapshot", "damaged", "has none"],
)
def test_who_cannot_give_it_is_not_named(other: Node) -> None:
    assert peers_of(WANTED, [node("a"), other], [WANTED]) == ()


@pytest.mark.parametrize(
    ("agent", "port", "address"),
    [("10.0.0.1:9446", 9447, "10.0.0.1:9447"), ("[fd00::1]:9446", 9447, "[fd00::1]:9447"), ("unix:/run/agent", 9447, ""), ("h:1", 0, "")],
)
def test_an_agent_serves_others_at_the_host_that_it_is_called_at(agent: str, port: int, address: str) -> None:
    assert peer_address(agent_pb2.Node(peer_port=port), agent) == address
