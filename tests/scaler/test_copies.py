"""How many nodes keep a snapshot, which of them count, and where another copy is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.plan.actions import Stage
from scaler.plan.copies import SHORT_SECONDS, copy, domain, is_short, lacking
from scaler.plan.policy import decide
from scaler.plan.rungs import Rung
from scaler.plan.scheduling import ZONE, PodDemands, Standing, Taint, Toleration
from scaler.plan.world import Gpu, Model, Node, Rates, Residency, Stored, World
from tests.worlds.planned import GB, NAME, serving, stages, world

DIGEST = "d" * 64
HAS = Residency(DIGEST, Rung.MEMORY, GB)
TWO = Model("chat", NAME, digest=DIGEST, copies=2)
KEPT = Stored("s3://b/p", DIGEST, GB)
LONG = {"chat": 0.0}


def node(address: str, residency: Residency | None = None, zone: str = "", **changes: object) -> Node:
    found = {} if residency is None else {NAME: residency}
    standing = Standing({ZONE: zone} if zone else {})
    there = Node(address, f"node-{address}", True, 100 * GB, 50 * GB, residencies=found, peer_address=f"{address}:1", standing=standing)
    return replace(there, **changes)  # type: ignore[arg-type]


def short(*nodes: Node, model: Model = TWO, **changes: object) -> World:
    return world(*nodes, model=model, short_since=LONG, **changes)


def made(found: World) -> str:
    """The node on which a copy is made; empty: none."""
    action = copy(found, found.models["chat"], [])
    return action.node if action else ""


def test_another_copy_is_made_on_another_node_and_no_third() -> None:
    (fetch,) = [each for each in decide(short(node("a", HAS), node("b"), node("c"))).actions if isinstance(each, Stage)]
    assert (fetch.node, fetch.rung, fetch.digest, fetch.reason) == ("b", Rung.DISK, DIGEST, "1 of 2 copies stand where they count")
    assert stages(short(node("a", HAS), node("b"), node("c"), under_way=(fetch,))) == [], "one at a time"
    assert not is_short([node("a", HAS), node("b", replace(HAS, rung=Rung.DISK)), node("c")], TWO)
    assert made(short(node("a", HAS), node("b", HAS), node("c"))) == ""
    assert made(short(serving(node("a", HAS), "r"), node("b"))) == "b", "whether a replica lives does not matter"
    assert made(short(node("a", HAS), node("b"), model=replace(TWO, stage=Rung.DISK))) == "b"


def test_it_is_made_in_another_zone_or_else_in_the_same() -> None:
    quick = Rates(remote_to_disk=5e9)
    nodes = (node("a", HAS, "one"), node("b", None, "one", rates=quick), node("c", None, "two"))
    assert made(short(*nodes)) == "c"
    found = copy(short(*nodes[:2]), TWO, [])
    assert found and found.node == "b" and found.reason.endswith("; no node of another domain could")
    assert made(short(node("a", HAS), node("b"), node("c", rates=quick))) == "c", "without zones each is a domain of its own"
    assert domain(node("a", zone="one")) == domain(node("b", zone="one")) != domain(node("c"))


def test_what_does_not_count() -> None:
    """A node that is not heard, one that has it damaged, and one that has an older one, which the new one takes the place of."""
    for other in (
        node("b", HAS, synced=False),
        node("b", replace(HAS, unusable="a chunk is missing")),
        node("b", replace(HAS, digest="e" * 64)),
    ):
        assert is_short([node("a", HAS), other, node("c")], TWO)
    assert made(short(node("a", HAS), node("b", replace(HAS, digest="e" * 64)))) == "b"
    assert made(short(node("a", HAS), node("b", replace(HAS, unusable="a chunk is missing")))) == ""


def test_an_agent_that_is_restarted_costs_no_copy() -> None:
    later: list[float] = []
    found = world(node("a", HAS), node("b", HAS, synced=False), node("c"), model=TWO, short_since={"chat": 90.0})
    assert copy(found, TWO, later) is None and later == [90.0 + SHORT_SECONDS]
    assert made(replace(found, now=90.0 + SHORT_SECONDS)) == "c"


def test_a_node_that_refused_is_passed_over() -> None:
    refused = {("b", DIGEST, Rung.DISK): 130.0}
    later: list[float] = []
    assert copy(short(node("a", HAS), node("b"), put_off=refused), TWO, later) is None and later == [130.0]
    assert made(short(node("a", HAS), node("b"), node("c"), put_off=refused)) == "c"


def test_a_copy_may_lie_where_gpus_are_in_use_but_not_where_they_are_too_small() -> None:
    big = replace(HAS, gpu_bytes=(30 * GB,))
    busy, small = (node("b", gpus=(Gpu("gpu", size * GB, GB),)) for size in (80, 20))
    assert made(short(node("a", big), busy)) == "b" and made(short(node("a", big), small)) == ""


def test_the_store_gives_what_no_node_has_or_gives() -> None:
    alone = node("b", peer_address="")
    one = replace(TWO, copies=1, stored=KEPT)
    assert made(short(alone, model=replace(one, stored=None))) == ""
    found = copy(short(alone, model=one), one, [])
    assert found and (found.node, found.store) == ("b", "s3://b/p")
    other = replace(one, stored=replace(KEPT, digest="e" * 64))
    assert made(short(alone, model=other)) == "", "another snapshot of that name"
    assert made(short(alone, model=replace(other, digest=""))) == "", "its owner has none that is good"


def test_a_copy_where_no_pod_is_put_does_not_count_and_none_is_made_there() -> None:
    model = replace(TWO, copies=1, pods=PodDemands())
    cordoned, tainted = Standing(cordoned=True), Standing(taints=(Taint("team", "other"),))
    for out in (cordoned, tainted):
        nodes = node("a", HAS, standing=out), node("b", standing=out), node("c")
        assert made(short(*nodes, model=model)) == "c", "it is given by the one that takes no pods itself"
        assert made(short(*nodes[:2], model=model)) == "", "no place for the next pod"
    tolerant = replace(model, pods=PodDemands((Toleration("team", "Exists"),)))
    assert not is_short([node("a", HAS, standing=tainted), node("c")], tolerant)
    waits = world(node("a", HAS, standing=cordoned), node("c"), model=model, short_since={"chat": 90.0})
    assert made(waits) == "" and made(replace(waits, now=90.0 + SHORT_SECONDS)) == "c", "a cordon that is soon taken back costs no copy"


def test_it_is_said_of_each_other_node_why_it_has_no_copy_that_counts() -> None:
    nodes = (
        node("a", HAS),
        node("b", HAS, standing=Standing(cordoned=True)),
        node("c", HAS, synced=False),
        node("d", standing=Standing(taints=(Taint("team", "other"),))),
        node("e", replace(HAS, unusable="a chunk is missing")),
        node("f", peer_address=""),
        node("g"),
    )
    assert lacking(reversed(nodes), replace(TWO, pods=PodDemands())) == [
        "node node-b: it is cordoned",
        "node node-c: its agent is not heard",
        "node node-d: its pods do not tolerate the taint team=other:NoSchedule",
        "node node-e: a chunk is missing",
        "node node-f: it fetches nothing from other nodes (agent.keysSecret), and no store has it (spec.store)",
        "node node-g: it can fetch it",
    ]


@pytest.mark.parametrize("copies", [1, 2, 3])
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from(["", "x", "y"])), max_size=6), st.booleans())
def test_copies_are_made_until_there_are_enough_and_no_more(copies: int, fleet: list[tuple[bool, bool, str]], stored: bool) -> None:
    model = replace(TWO, copies=copies, stored=KEPT if stored else None)
    nodes = {str(at): node(str(at), HAS if has else None, zone, synced=synced) for at, (has, synced, zone) in enumerate(fleet)}
    before = sum(has and synced for has, synced, _ in fleet)
    for _ in range(copies + 1):
        if not (where := made(short(*nodes.values(), model=model))):
            break
        assert nodes[where].synced and NAME not in nodes[where].residencies
        nodes[where] = replace(nodes[where], residencies={NAME: replace(HAS, rung=Rung.DISK)})
    after = sum(each.synced and NAME in each.residencies for each in nodes.values())
    could = sum(synced for _, synced, _ in fleet) if before or stored else 0
    assert after == max(before, min(copies, could))
