"""The policy for snapshots on nodes that do not have them: who fetches one, when, and where pods go meanwhile."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scaler.books.demand import Demand
from scaler.plan.actions import Stage
from scaler.plan.policy import decide, prefer, prefer_for_capture
from scaler.plan.rungs import Rung
from scaler.plan.scheduling import PodDemands, Standing, Taint
from scaler.plan.world import Gpu, Node, Rates, Residency
from tests.worlds.planned import CHAT, GB, NAME, WAITS, node, serving, stages, world

BIG = Residency("d" * 64, Rung.MEMORY, GB, gpu_bytes=(30 * GB,))


def fetching(address: str, residency: Residency | None = None, *, free: int = 70, **changes: object) -> Node:
    """One that exchanges snapshots with others, and has one GPU."""
    found = {} if residency is None else {NAME: residency}
    there = replace(node(address, None), residencies=found, gpus=(Gpu("gpu", 80 * GB, free * GB),), peer_address=f"{address}:1")
    return replace(there, **changes)


FULL = fetching("full", BIG, free=10)
LONG = {"chat": 0.0}


def test_a_snapshot_whose_nodes_have_no_room_is_fetched_by_the_one_that_serves_soonest() -> None:
    quick = fetching("quick", rates=Rates(remote_to_disk=5e9))
    nodes = (FULL, fetching("slow"), fetching("small", free=20), quick, fetching("alone", peer_address=""))
    (fetch,) = decide(world(*nodes, cramped_since=LONG)).actions
    assert isinstance(fetch, Stage) and (fetch.node, fetch.rung, fetch.digest) == ("quick", Rung.DISK, "d" * 64)
    assert decide(world(*nodes, cramped_since=LONG, under_way=(fetch,))).actions == (), "one at a time"
    (asked,) = decide(world(*nodes, cramped_since=LONG, demand=WAITS, model=replace(CHAT, stage=Rung.DISK))).actions
    assert isinstance(asked, Stage) and asked.node == "quick" and "requests wait" in asked.reason
    there = replace(nodes[3], residencies={NAME: replace(BIG, rung=Rung.DISK)})
    assert stages(world(FULL, nodes[1], there, cramped_since=LONG)) == [("quick", Rung.MEMORY)], "and goes up like any other"
    assert stages(world(*nodes, fetching("has", BIG), cramped_since=LONG)) == [], "one has room"
    assert stages(world(*nodes, cramped_since=LONG, model=replace(CHAT, stage=Rung.DISK))) == [], "it waits on disk, till somebody asks"
    assert stages(world(*nodes, cramped_since=LONG, model=replace(CHAT, digest=""))) == [], "its owner has none that is good"


def test_where_no_pod_is_put_nothing_is_staged_or_fetched_and_nobody_is_sent() -> None:
    """A cordon and a taint; what stands there goes to a node that takes pods, and those prefer that one."""
    asks = replace(CHAT, pods=PodDemands(selector={"gpu": "yes"}))
    takes = Standing({"gpu": "yes"})
    cordoned, tainted = replace(takes, cordoned=True), replace(takes, taints=(Taint("team", "other"),))
    on_disk = replace(BIG, rung=Rung.DISK)
    for out in (cordoned, tainted, Standing()):
        holder, free = fetching("a", on_disk, standing=out), fetching("c", standing=takes)
        nodes = (holder, fetching("b", standing=out), free)
        assert stages(world(*nodes, model=asks, cramped_since=LONG)) == [("c", Rung.DISK)]
        assert stages(world(*nodes, model=asks, cramped_since={"chat": 96.0}, demand=WAITS)) == [("c", Rung.DISK)]
        assert stages(world(*nodes[:2], model=asks, cramped_since=LONG, demand=WAITS)) == []
        assert prefer(world(*nodes), asks, "d" * 64).seconds.keys() == {"c"}
        there = replace(free, residencies={NAME: on_disk})
        assert stages(world(holder, there, model=asks)) == [("c", Rung.MEMORY)]
        assert prefer(world(holder, there), asks, "d" * 64).seconds.keys() == {"c"}
        assert prefer_for_capture(world(*nodes), asks).seconds.keys() == {"c"}


def test_a_moment_without_room_moves_nothing() -> None:
    """What a replica held is counted as taken for seconds after its end."""
    nodes = (FULL, fetching("b"))
    plan = decide(world(*nodes, cramped_since={"chat": 80.0}))
    assert (plan.actions, plan.look_again) == ((), 110.0)
    plan = decide(world(*nodes, cramped_since={"chat": 98.0}, demand=WAITS))
    assert (plan.actions, plan.look_again) == ((), 101.0), "who waits does not wait for long"
    assert stages(world(*nodes)) == [], "it was never seen before"
    assert stages(world(serving(FULL, "r"), nodes[1], cramped_since=LONG)) == [], "its own replica has the room"


def test_a_node_that_has_refused_is_passed_over_and_asked_again_later() -> None:
    nodes = (FULL, fetching("b", rates=Rates(remote_to_disk=5e9)), fetching("c"))
    refused = {("b", "d" * 64, Rung.DISK): 130.0}
    assert stages(world(*nodes, cramped_since=LONG, put_off=refused)) == [("c", Rung.DISK)]
    plan = decide(world(*nodes[:2], cramped_since=LONG, put_off=refused))
    assert (plan.actions, plan.look_again) == ((), 130.0)
    assert stages(world(*nodes[:2], cramped_since=LONG, put_off=refused, now=130.0)) == [("b", Rung.DISK)]
    assert list(prefer(world(*nodes, put_off=refused), CHAT, "d" * 64).seconds) == ["c"]


def test_a_fetch_that_would_take_too_long_is_left() -> None:
    """2 s for the network and 1 s for the disk."""
    nodes = (FULL, fetching("b"))
    assert stages(world(*nodes, cramped_since=LONG, model=replace(CHAT, longest_staging=2.9))) == []
    assert stages(world(*nodes, cramped_since=LONG, model=replace(CHAT, longest_staging=3.1))) == [("b", Rung.DISK)]


def test_pods_are_preferred_where_it_is_and_where_it_could_be_fetched_only_if_it_is_nowhere_to_be_restored() -> None:
    slow = fetching("slow", replace(BIG, rung=Rung.DISK), rates=Rates(disk_to_memory=0.1e9))
    nodes = (fetching("quick", rates=Rates(remote_to_disk=50e9)), slow, fetching("small", free=20), fetching("has", BIG))
    found = prefer(world(*nodes), CHAT, "d" * 64).seconds
    assert list(found) == ["has", "slow"]
    assert list(prefer(world(*nodes, FULL), CHAT, "d" * 64).seconds) == ["has", "slow"]
    assert list(prefer(world(nodes[0], FULL), CHAT, "d" * 64).seconds) == ["quick"]
    assert list(prefer(world(*nodes), CHAT, "another").seconds) == []


fleets = st.lists(
    st.builds(
        lambda address, has, free, rate, synced: fetching(
            address, replace(BIG, rung=has) if has else None, free=free, rates=Rates(remote_to_disk=rate), synced=synced
        ),
        st.sampled_from("abcdef"),
        st.none() | st.sampled_from([Rung.DISK, Rung.MEMORY]),
        st.sampled_from([10, 70]),
        st.sampled_from([0.0, 1e8, 1e9]),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda each: each.address,
)


@given(fleets, st.integers(0, 2))
def test_a_fetch_ends_what_it_was_for_and_nothing_follows_it(found: list[Node], pending: int) -> None:
    """It goes to one node without it that has room, and once it is there none is asked for any more: no snapshot wanders."""
    here = world(*found, cramped_since=LONG, demand={"chat": Demand(pending, 0, 0)})
    fetches = [each for each in decide(here).actions if isinstance(each, Stage) and each.rung is Rung.DISK]
    could = any(each.synced and NAME in each.residencies and each.gpus[0].free_bytes > 30 * GB for each in found)
    assert len(fetches) <= 1 and not (fetches and could)
    for fetch in fetches:
        (to,) = [each for each in found if each.address == fetch.node]
        assert to.synced and NAME not in to.residencies and to.gpus[0].free_bytes > 30 * GB
        has = replace(to, residencies={NAME: replace(BIG, rung=Rung.DISK)})
        after = replace(here, nodes=tuple(has if each is to else each for each in found))
        assert not any(rung is Rung.DISK for _, rung in stages(after))
