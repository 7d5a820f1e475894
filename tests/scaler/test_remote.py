"""Which nodes could fetch a snapshot that others have, and when it would be of use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.remote import is_cramped, remote
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.scheduling import Standing
from scaler.plan.world import Gpu, Model, Node, Replica, Residency, Stored

NAME = SnapshotName("ns", "chat")
CHAT = Model("chat", NAME)
HAS = Residency(
    "d", Rung.MEMORY, 100, 50, WeightsRung.GPU, gpu_bytes=(10 << 30,), overhead_seconds=0.2, parked_bytes=(1,), cold_seconds=7.0
)


def node(address: str, residency: Residency | None = None, *, free: int = 80 << 30, **changes: object) -> Node:
    found = {} if residency is None else {NAME: residency}
    there = Node(address, address, True, residencies=found, peer_address=f"{address}:9447", gpus=(Gpu("gpu", 80 << 30, free),))
    return replace(there, **changes)  # type: ignore[arg-type]


def names(*nodes: Node, digest: str | None = None) -> list[str]:
    return [there.name for there, _ in remote(nodes, NAME, digest)]


def test_a_node_without_it_can_fetch_it_from_all_that_have_it() -> None:
    [(there, residency)] = remote([node("a", HAS), node("b"), node("c", HAS)], NAME, None)
    assert there.name == "b"
    assert residency == Residency(
        "d", Rung.ABSENT, 100, 50, WeightsRung.ABSENT, gpu_bytes=(10 << 30,), sources=("a", "c"), cold_seconds=7.0
    )


@pytest.mark.parametrize(
    "other",
    [
        node("b", HAS),
        node("b", replace(HAS, digest="older")),
        node("b", synced=False),
        node("b", peer_address=""),
        node("b", standing=Standing(cordoned=True)),
    ],
    ids=["has it", "has another of that name", "is not heard", "exchanges nothing", "is cordoned"],
)
def test_who_is_no_candidate(other: Node) -> None:
    assert names(node("a", HAS), other, digest="d") == []


@pytest.mark.parametrize(
    "holder",
    [
        node("a", HAS, synced=False),
        node("a", HAS, peer_address=""),
        node("a", replace(HAS, unusable="damaged")),
        node("a", replace(HAS, digest="older")),
    ],
    ids=["is not heard", "gives nothing", "damaged", "another one"],
)
def test_who_can_give_nothing(holder: Node) -> None:
    assert names(holder, node("b"), digest="d") == []


def test_a_store_gives_it_to_every_node() -> None:
    """To those that exchange nothing with others, too, and where no node has it any more."""
    stored = Stored("s3://b/p", "d", 100, 50, (10 << 30,))
    found = remote([node("a", HAS), node("b"), node("c", peer_address="")], NAME, None, stored)
    assert [(each.name, there.sources, there.store) for each, there in found] == [("b", ("a",), "s3://b/p"), ("c", (), "s3://b/p")]
    [(_, there)] = remote([node("c", peer_address="")], NAME, "d", stored)
    assert there == Residency("d", Rung.ABSENT, 100, 50, WeightsRung.ABSENT, gpu_bytes=(10 << 30,), store="s3://b/p")
    assert remote([node("b")], NAME, "e", stored) == [], "another snapshot of that name"
    assert remote([node("a", HAS), node("b")], NAME, None, replace(stored, digest="e")) == [], "it and the node do not agree"


def test_nodes_that_do_not_agree_are_not_chosen_between() -> None:
    two = (node("a", HAS), node("b", replace(HAS, digest="other")), node("c"))
    assert names(*two) == [] and names(*two, digest="other") == ["c"] and names(*two, digest="") == []


def test_a_model_is_cramped_where_no_node_that_has_it_could_restore_it() -> None:
    full = node("a", HAS, free=1 << 30)
    assert is_cramped([full, node("b")], CHAT)
    assert is_cramped([full, node("b", free=1 << 30)], CHAT), "whether there is a better node is another question"
    assert not is_cramped([full, node("b"), node("c", HAS)], CHAT), "one has room"
    assert is_cramped([full, node("b"), node("c", HAS, synced=False)], CHAT), "one may have, but is not heard"
    assert not is_cramped([full], CHAT) and not is_cramped([node("b")], CHAT), "nothing can be fetched"
    assert not is_cramped([replace(full, replicas={"r": Replica("r", "chat")}), node("b")], CHAT), "its own replica has the room"
    assert is_cramped([replace(full, replicas={"r": Replica("r", "other")}), node("b")], CHAT)
    assert not is_cramped([full, node("b")], Model("chat"))
