"""The policy, world by world: no socket, no clock, no root."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scaler.books.demand import Demand, Elsewhere
from scaler.plan.actions import Action, Drop, End, Keep, Pin, Sleep, Stage, Start
from scaler.plan.policy import decide, prefer, prefer_for_capture
from scaler.plan.rungs import Rung
from scaler.plan.world import Gpu, Model, Node, Replica, Residency, ScaleTarget, World
from tests.worlds.planned import CHAT, GB, NAME, WAITS, node, serving, stages, world


def kinds(actions: tuple[Action, ...]) -> list[tuple[str, str]]:
    """What is done, and where."""
    return [(type(action).__name__, getattr(action, "node", "")) for action in actions]


# Snapshots


def test_a_snapshot_waits_where_its_owner_says_on_every_node_that_has_it() -> None:
    nodes = (node("a", Rung.DISK), node("b", Rung.MEMORY), node("c", None), node("d", Rung.DISK, synced=False))
    assert stages(world(*nodes)) == [("a", Rung.MEMORY)]
    assert stages(world(*nodes, model=replace(CHAT, stage=Rung.DISK))) == []
    assert stages(world(*nodes, model=replace(CHAT, stage=Rung.STANDBY))) == [("a", Rung.MEMORY), ("b", Rung.STANDBY)]
    nodes = (*nodes, node("e", Rung.STANDBY), node("f", Rung.PARKED))
    parked = [("a", Rung.MEMORY), ("b", Rung.STANDBY), ("e", Rung.PARKED)]
    assert stages(world(*nodes, model=replace(CHAT, stage=Rung.PARKED))) == parked, "one rung at a time"


def test_requests_that_wait_have_the_best_node_stage() -> None:
    asked = replace(CHAT, stage=Rung.DISK)
    nodes = (node("slow", Rung.DISK, size=9 * GB), node("quick", Rung.DISK))
    assert stages(world(*nodes, model=asked, demand=WAITS)) == [("quick", Rung.MEMORY)]
    assert [each.urgent for each in decide(world(*nodes, model=asked, demand=WAITS)).actions if isinstance(each, Stage)] == [True]
    assert stages(world(*nodes, node("ready"), model=asked, demand=WAITS)) == [], "the best node has it in memory"
    assert stages(world(serving(nodes[0], "r"), nodes[1], model=asked, demand=WAITS)) == [], "somebody serves"


def test_staging_that_would_take_too_long_is_left() -> None:
    model = replace(CHAT, longest_staging=1.5)
    assert stages(world(node("a", Rung.DISK, size=GB), node("b", Rung.DISK, size=2 * GB), model=model)) == [("a", Rung.MEMORY)]


def test_a_standby_is_made_while_nobody_asks_and_given_up_when_somebody_does() -> None:
    model = replace(CHAT, stage=Rung.STANDBY)
    (standby,) = decide(world(node("a"), model=model)).actions
    assert isinstance(standby, Stage) and standby.rung is Rung.STANDBY
    assert stages(world(serving(node("a"), "r"), model=model)) == []
    plan = decide(world(node("a"), model=model, under_way=(standby,), demand=WAITS))
    assert [(type(each), each.rung) for each in plan.actions if isinstance(each, Drop)] == [(Drop, Rung.MEMORY)]
    assert decide(world(node("a"), model=model, under_way=(standby,))).actions == ()


def test_what_an_agent_refused_is_put_off_and_not_forgotten() -> None:
    """One rung that was refused puts off that rung alone."""
    model = replace(CHAT, stage=Rung.STANDBY)
    refused = {("a", "d" * 64, Rung.STANDBY): 130.0}
    plan = decide(world(node("a"), model=model, put_off=refused))
    assert (plan.actions, plan.look_again) == ((), 130.0)
    assert stages(world(node("a", Rung.DISK), model=model, put_off=refused)) == [("a", Rung.MEMORY)]
    assert stages(world(node("a"), model=model, put_off=refused, now=130.0)) == [("a", Rung.STANDBY)]


def test_what_cannot_be_parked_stays_a_standby() -> None:
    model = replace(CHAT, stage=Rung.PARKED)
    refused = {("a", "d" * 64, Rung.PARKED): 130.0}
    plan = decide(world(node("a", Rung.STANDBY), model=model, put_off=refused))
    assert (plan.actions, plan.look_again) == ((), 130.0)
    assert stages(world(node("a"), model=model, put_off=refused)) == [("a", Rung.STANDBY)]
    assert stages(world(node("a", Rung.STANDBY), model=model, put_off=refused, now=130.0)) == [("a", Rung.PARKED)]
    assert stages(world(node("b", Rung.STANDBY), model=model, put_off=refused)) == [("b", Rung.PARKED)], "another node has room"


def test_one_is_parked_while_nobody_asks_and_not_given_up_when_somebody_does() -> None:
    """What is left of the parking is sooner than a restore from the beginning."""
    model = replace(CHAT, stage=Rung.PARKED)
    (parking,) = decide(world(node("a", Rung.STANDBY), model=model)).actions
    assert isinstance(parking, Stage) and parking.rung is Rung.PARKED
    assert stages(world(serving(node("a", Rung.STANDBY), "r"), model=model)) == []
    assert decide(world(node("a", Rung.STANDBY), model=model, under_way=(parking,))).actions == ()
    assert decide(world(node("a", Rung.STANDBY), model=model, under_way=(parking,), demand=WAITS)).actions == ()


def test_what_goes_down_by_itself_is_not_pushed_up_again() -> None:
    """An idle replica that is kept parked for a while, then as a standby: its snapshot waits lower than both, or as a standby."""
    for stage in (Rung.MEMORY, Rung.STANDBY):
        model = replace(CHAT, stage=stage, parked_seconds=300.0, standby_seconds=3600.0)
        assert [stages(world(node("a", rung), model=model)) for rung in (Rung.PARKED, Rung.STANDBY)] == [[], []]


def test_a_node_to_which_a_pod_has_come_fetches_its_snapshot_if_that_is_sooner_than_a_cold_start() -> None:
    def having(name: str, cold: float) -> Node:
        there = node(name, peer_address=f"{name}:9447")
        return replace(there, residencies={NAME: replace(there.residencies[NAME], cold_seconds=cold)})

    model = replace(CHAT, digest="d" * 64)
    lacking = [node(name, None, peer_address=f"{name}:9447") for name in ("b", "c")]

    def found(cold: float = 60.0, here: tuple[str, ...] = ("b",), of: Model = model, **changes: object) -> list[tuple[str, Rung]]:
        return stages(world(having("a", cold), *lacking, model=of, arriving={"chat": here}, **changes))

    assert found() == [("b", Rung.DISK)]
    assert found(here=("b", "c")) == [("b", Rung.DISK), ("c", Rung.DISK)], "each its own"
    assert found(here=("a",)) == [], "it is there"
    assert found(here=()) == []
    assert found(cold=3.0) == [], "2 s for the fetch, 1 s to stage it, and more to restore it"
    assert found(cold=0.0) == [], "nobody knows what a cold start takes"
    assert found(of=replace(model, longest_staging=2.0)) == []
    assert found(of=replace(model, digest="")) == [], "no snapshot of that name may be fetched"
    assert found(put_off={("b", "d" * 64, Rung.DISK): 130.0}) == [], "its agent has refused"
    (stage,) = decide(world(having("a", 60.0), *lacking, model=model, arriving={"chat": {"b"}})).actions
    assert found(under_way=(stage,)) == []


def test_an_unusable_snapshot_is_left_where_it_is() -> None:
    broken = replace(node("a", Rung.DISK), residencies={NAME: Residency("d", Rung.DISK, 1, unusable="corrupt")})
    assert decide(world(broken, demand=WAITS)).actions == ()


# Replicas that are made here


def test_replicas_start_where_they_serve_soonest() -> None:
    nodes = (node("disk", Rung.DISK), node("memory"), node("none", None, free=90 * GB))
    wanted = replace(CHAT, replicas=2, stage=Rung.DISK)
    starts = [action for action in decide(world(*nodes, model=wanted)).actions if isinstance(action, Start)]
    assert [(start.node, start.number) for start in starts] == [("memory", 1), ("memory", 2)]
    assert all("its snapshot is there" in start.reason for start in starts)


def test_replicas_spread_when_a_gpu_is_full() -> None:
    def gpu(address: str, *free: int) -> Node:
        gpus = tuple(Gpu(f"{address}-{index}", 80 * GB, size * GB) for index, size in enumerate(free))
        return replace(node(address), gpus=gpus, residencies={NAME: Residency("d", Rung.MEMORY, GB, gpu_bytes=(30 * GB,))})

    wanted = replace(CHAT, replicas=4)
    starts = [each.node for each in decide(world(gpu("a", 70), gpu("b", 40, 40), model=wanted)).actions if isinstance(each, Start)]
    assert starts == ["a", "a", "b", "b"]


def test_a_request_goes_where_its_engine_is_parked_and_the_next_one_elsewhere() -> None:
    """Each node has one that waits, so a second replica on it would be restored from the image."""
    nodes = (node("memory"), node("standby", Rung.STANDBY), node("parked", Rung.PARKED), node("disk", Rung.DISK))
    wanted = replace(CHAT, replicas=3, stage=Rung.DISK)
    starts = [action for action in decide(world(*nodes, model=wanted)).actions if isinstance(action, Start)]
    assert [start.node for start in starts] == ["parked", "standby", "memory"]
    more = decide(world(*nodes, model=wanted, under_way=tuple(starts[:1]))).actions
    assert [action.node for action in more if isinstance(action, Start)] == ["standby", "memory"]


def test_a_parked_one_is_woken_on_a_gpu_that_is_full() -> None:
    """Full of what others hold: what parked ones hold counts as free, its own too."""
    full = (Gpu("gpu", 80 * GB, 2 * GB),)
    residency = Residency("d" * 64, Rung.PARKED, GB, gpu_bytes=(2 * GB,), parked_bytes=(2 * GB,))
    parked = replace(node("parked"), gpus=full, residencies={NAME: residency})
    standby = replace(node("standby"), gpus=full, residencies={NAME: replace(residency, rung=Rung.STANDBY, parked_bytes=())})
    (start,) = decide(world(standby, parked, model=replace(CHAT, replicas=1))).actions
    assert isinstance(start, Start) and start.node == "parked"


def test_without_a_snapshot_the_node_with_the_most_room_starts_it() -> None:
    bare = Model("chat", replicas=1)
    (start,) = decide(world(node("full", None, free=GB), node("free", None, free=50 * GB), model=bare)).actions
    assert isinstance(start, Start) and start.node == "free" and "most room" in start.reason


def test_no_node_is_said_and_a_failed_start_is_waited_for() -> None:
    wanted = replace(CHAT, replicas=1)
    plan = decide(world(node("a", synced=False), model=wanted))
    assert (plan.actions, plan.unmet) == ((), {"chat": "no restore agent is connected"})
    plan = decide(world(node("a"), model=replace(wanted, not_before=101.5)))
    assert (plan.actions, plan.unmet, plan.look_again) == ((), {}, 101.5)


def test_what_is_too_much_ends_the_least_busy_and_youngest_first() -> None:
    wanted = replace(CHAT, replicas=1, parked_seconds=60.0, standby_seconds=600.0)
    here = serving(node("a"), "old", "busy", "young")
    plan = decide(world(here, model=wanted, in_flight={"busy": 2}))
    ends = [(each.replica, each.parked_seconds, each.standby_seconds) for each in plan.actions if isinstance(each, End)]
    assert ends == [("young", 60.0, 600.0), ("old", 60.0, 600.0)]


def test_starts_under_way_are_given_up_before_a_replica_ends() -> None:
    wanted = replace(CHAT, replicas=1)
    starting = (Start("chat", "a", "", number=1), Start("chat", "a", "", number=2))
    plan = decide(world(serving(node("a"), "r"), model=wanted, under_way=starting))
    assert [(each.replica, each.number) for each in plan.actions if isinstance(each, End)] == [("", 1), ("", 2)]
    ending = End("chat", "a", "r", "")
    assert kinds(decide(world(serving(node("a"), "r"), model=wanted, under_way=(ending,))).actions) == [("Start", "a")]


# Replicas that Kubernetes makes


def test_what_has_not_ended_yet_is_kept_when_more_are_wanted() -> None:
    two = replace(CHAT, replicas=2)
    busy, idle = End("chat", "a", "busy", ""), End("chat", "a", "idle", "")
    found = world(serving(node("a"), "busy", "idle"), model=two, under_way=(busy, idle), in_flight={"busy": 1, "idle": 0})
    kept, started = (action for action in decide(found).actions if isinstance(action, Keep | Start))
    assert (kept, type(started)) == (Keep("chat", "a", "busy", ""), Start), "one that has nothing left may be gone by now"
    other = replace(found, models={"chat": replace(CHAT, replicas=1)})
    assert [action for action in decide(other).actions if isinstance(action, Keep | Start)] == [Keep("chat", "a", "busy", "")]
    assert not [action for action in decide(replace(other, models={"chat": replace(CHAT, replicas=0)})).actions if isinstance(action, Keep)]


def test_a_backlog_is_scaled_to_what_the_hpa_would_ask_for() -> None:
    def replicas(pending: int, target: ScaleTarget) -> list[int]:
        found = decide(world(node("a"), demand={"chat": Demand(pending, 0, 0)}, targets={"chat": target})).actions
        return [action.replicas for action in found if isinstance(action, Start)]

    assert replicas(32, ScaleTarget(1, 8.0, 100)) == [4]
    assert replicas(32, ScaleTarget(1, 8.0, 3)) == [3]
    assert replicas(32, ScaleTarget(0, 8.0, 100)) == [], "KEDA leaves zero"
    assert replicas(8, ScaleTarget(1, 8.0, 100)) == []
    assert replicas(8, ScaleTarget(4, 8.0, 100)) == [], "the HPA takes away"


def test_pods_are_preferred_by_the_estimate() -> None:
    other = replace(node("other"), residencies={NAME: Residency("another", Rung.MEMORY, 1)})
    nodes = (node("disk", Rung.DISK), node("memory"), node("none", None), other, node("lost", synced=False), node("", Rung.MEMORY))
    found = prefer(world(*nodes), CHAT, "d" * 64)
    assert list(found.seconds) == ["memory", "disk"]


def test_captures_go_where_there_is_room() -> None:
    nodes = (node("full", None, free=0), node("tight", None, free=GB), node("free", None, free=60 * GB), node("lost", None, synced=False))
    assert list(prefer_for_capture(world(*nodes), CHAT).seconds) == ["free", "tight"]


# Whatever the world

rungs = st.sampled_from(list(Rung))
nodes = st.lists(
    st.builds(
        lambda address, rung, synced, free, ids: replace(
            node(address, rung, free=free, synced=synced),
            replicas={f"{address}-{each}": Replica(f"{address}-{each}", "chat") for each in ids},
        ),
        st.sampled_from("abcdef"),
        rungs,
        st.booleans(),
        st.integers(0, 100 * GB),
        st.lists(st.integers(0, 9), max_size=3, unique=True),
    ),
    max_size=5,
    unique_by=lambda each: each.address,
)
worlds = st.builds(
    lambda found, stage, replicas, pending, now: world(
        *found, model=replace(CHAT, stage=stage, replicas=replicas, not_before=50.0), demand={"chat": Demand(pending, 0, 0)}, now=now
    ),
    nodes,
    rungs,
    st.none() | st.integers(0, 6),
    st.integers(0, 3),
    st.sampled_from([0.0, 100.0]),
)


@given(worlds)
def test_the_same_world_gives_the_same_plan_and_is_left_as_it_was(found: World) -> None:
    before = repr(found)
    plan = decide(found)
    assert decide(found) == plan
    assert [action.reason for action in decide(found).actions] == [action.reason for action in plan.actions]
    assert all(action.reason for action in plan.actions) and repr(found) == before


@given(worlds)
def test_what_is_under_way_is_not_decided_again(found: World) -> None:
    plan = decide(found)
    again = decide(replace(found, under_way=plan.actions))
    assert not set(again.actions) & set(plan.actions)
    assert math.isinf(again.look_again) or again.look_again > found.now


@given(worlds)
def test_nothing_is_asked_of_a_node_that_is_not_there(found: World) -> None:
    synced = {each.address for each in found.nodes if each.synced}
    assert all(action.node in synced for action in decide(found).actions if isinstance(action, Stage | Start))


@given(worlds)
def test_a_snapshot_goes_up_one_rung_at_a_time_and_never_above_its_owner_s_wish(found: World) -> None:
    model = found.models["chat"]
    asked = found.demand_of("chat").pending > 0
    stands = {each.address: each.residencies[NAME].rung for each in found.nodes}
    for action in decide(found).actions:
        if isinstance(action, Stage):
            assert action.rung == stands[action.node] + 1
            assert action.rung <= max(model.stage, Rung.MEMORY if asked else Rung.DISK)
            assert action.rung <= Rung.MEMORY or not (asked or any(each.replicas for each in found.nodes))


@given(worlds, st.sets(st.tuples(st.sampled_from("abcdef"), st.sampled_from([Rung.MEMORY, Rung.STANDBY, Rung.PARKED]))))
def test_what_is_put_off_is_asked_for_when_its_moment_has_come(found: World, keys: set[tuple[str, Rung]]) -> None:
    """And not before, and nothing else waits for it."""
    free = stages(found)
    held = replace(found, put_off={(address, "d" * 64, rung): found.now + 30.0 for address, rung in keys})
    assert stages(held) == [each for each in free if each not in keys]
    if keys & set(free):
        assert found.now < decide(held).look_again <= found.now + 30.0
    assert stages(replace(held, now=found.now + 30.0)) == free


@given(worlds)
def test_starts_and_ends_bring_the_wish(found: World) -> None:
    plan, model = decide(found), found.models["chat"]
    live = sum(len(each.replicas) for each in found.nodes)
    starts = [action for action in plan.actions if isinstance(action, Start)]
    ends = [action for action in plan.actions if isinstance(action, End)]
    if model.replicas is None:
        assert not starts and not ends
    elif starts or ends:
        assert live + len(starts) - len(ends) == model.replicas
    else:
        assert live == model.replicas or "chat" in plan.unmet or model.not_before > found.now


# Replicas that nobody asks


def test_a_replica_that_nobody_asks_sleeps_when_its_time_has_come() -> None:
    idle = replace(CHAT, idle=Rung.STANDBY, idle_seconds=10.0)
    where = replace(node("a"), replicas={"old": Replica("old", "chat", since=0.0), "young": Replica("young", "chat", since=95.0)})
    quiet = world(where, model=idle, quiet_since={"chat": 89.0})
    plan = decide(quiet)
    assert plan.actions == (Sleep("a", "chat", "old", Rung.STANDBY, ""),)
    assert plan.look_again == 105.0, "the young one has had ten seconds then"
    assert decide(world(where, model=replace(idle, idle=None), quiet_since={"chat": 89.0})).actions == ()
    recent = decide(replace(quiet, quiet_since={"chat": 92.0}))
    assert (recent.actions, recent.look_again) == ((), 102.0)
    assert decide(replace(quiet, under_way=plan.actions)).actions == (), "it is on its way"
    assert decide(replace(quiet, demand={"chat": Demand(0, 1, 2)})).actions == (), "somebody asks, a stream for one"
    silent = Demand(0, 0, 2, elsewhere=Elsewhere(unknown="redis says nothing"))
    assert decide(replace(quiet, demand={"chat": silent})).actions == (), "somebody may ask"


def test_one_that_sleeps_or_was_refused_or_is_cut_off_is_left_alone() -> None:
    idle = replace(CHAT, idle=Rung.PARKED, idle_seconds=1.0)
    asleep = replace(node("a"), replicas={"one": Replica("one", "chat", sleeps=Rung.STANDBY), "other": Replica("other", "mine")})
    assert decide(world(asleep, model=idle)).actions == ()
    awake = serving(node("a"), "one")
    refused = decide(world(awake, model=idle, put_off={("a", "one", Rung.PARKED): 130.0}))
    assert (refused.actions, refused.look_again) == ((), 130.0)
    assert kinds(decide(world(awake, model=idle, put_off={("a", "one", Rung.PARKED): 99.0})).actions) == [("Sleep", "a")]
    assert decide(world(replace(awake, synced=False), model=idle)).actions == ()


# Pins


def test_a_snapshot_is_pinned_wherever_it_is_as_its_owner_wishes_now() -> None:
    def pins(found: World) -> list[tuple[str, Rung]]:
        return [(action.node, action.rung) for action in decide(found).actions if isinstance(action, Pin)]

    model = replace(CHAT, pin=Rung.MEMORY)
    both = node("a"), node("b", Rung.DISK), node("c", None)
    assert pins(world(*both)) == [], "an agent that says nothing of pins has none"
    assert pins(world(*both, model=model)) == [("a", Rung.MEMORY), ("b", Rung.MEMORY)]
    there = replace(both[0], residencies={NAME: replace(both[0].residencies[NAME], pinned=Rung.MEMORY)})
    assert pins(world(there, model=model)) == []
    assert pins(world(there, model=replace(CHAT, pin=Rung.DISK))) == [("a", Rung.DISK)]
    assert pins(world(there)) == [("a", Rung.ABSENT)]
    unreadable = replace(both[0], residencies={NAME: replace(both[0].residencies[NAME], digest="", unusable="its manifest is gone")})
    assert pins(world(unreadable, model=model)) == []


def test_a_pin_that_an_agent_refused_is_put_off_and_puts_nothing_else_off() -> None:
    model = replace(CHAT, pin=Rung.MEMORY)
    refused = {("a", "d" * 64, Rung.MEMORY): 130.0}
    plan = decide(world(node("a", Rung.DISK), model=model, pins_put_off=refused))
    assert ([type(each) for each in plan.actions], plan.look_again) == ([Stage], 130.0)
    plan = decide(world(node("a"), model=model, put_off=refused, pins_put_off=refused, now=130.0))
    assert [type(each) for each in plan.actions] == [Pin]
