"""What is moved into memory ahead of need, and for what it makes room."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler.books.demand import Demand, Elsewhere
from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import Drop, Stage, Start
from scaler.plan.ahead import ENOUGH_CREDIT, ENOUGH_STATEMENTS, LEFT_SECONDS, Ahead, Decision, ahead, has_earned, moves_nothing
from scaler.plan.displaced import SPARE_BYTES, coming, standing
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.scheduling import Standing
from scaler.plan.world import Gpu, Model, Node, Replica, Residency, Transfer, World
from scaler.plan.worth import OBJECTIVES, SWAP

GB = 10**9
NOW = 5000.0


def name_of(model: str) -> SnapshotName:
    return SnapshotName("ns", model)


def model(name: str, stage: Rung = Rung.DISK, **changes: object) -> Model:
    return replace(Model(name, name_of(name), stage), **changes)  # type: ignore[arg-type]


def there(name: str, rung: Rung = Rung.DISK, size: int = GB, **changes: object) -> Residency:
    return replace(Residency(f"digest of {name}", rung, size), **changes)  # type: ignore[arg-type]


def node(address: str, *, limit: int = 10 * GB, **has: Residency | Rung) -> Node:
    """One whose memory takes images of `limit` bytes, and has these."""
    found = {name: each if isinstance(each, Residency) else there(name, each) for name, each in has.items()}
    staged = sum(each.image_bytes for each in found.values() if each.rung >= Rung.MEMORY)
    residencies = {name_of(name): each for name, each in found.items()}
    return Node(address, address, True, 100 * GB, 100 * GB, residencies=residencies, staged_bytes=staged, staged_limit_bytes=limit)


def world(*nodes: Node, models: tuple[Model, ...] = (), **changes: object) -> World:
    """models: beside those that stand on the nodes, whose owners want them on disk."""
    names = {snapshot.name for each in nodes for snapshot in each.residencies}
    every = {name: model(name) for name in sorted(names)} | {each.name: each for each in models}
    return replace(World(NOW, every, nodes), **changes)  # type: ignore[arg-type]


def plan(found: World, **chances: float) -> Ahead:
    return ahead(found, chances, earned=True)


def moves(found: Ahead) -> list[tuple[str, str, str]]:
    return [("stage" if isinstance(each, Stage) else "drop", each.model, each.node) for each in found.actions]


def test_a_namespace_at_its_quota_gets_nothing_more() -> None:
    nodes = node("a", one=Rung.DISK, two=Rung.DISK), node("b", one=Rung.DISK, two=Rung.DISK)
    found = plan(world(*nodes, quotas={"ns": GB}), one=0.9, two=0.5)
    assert [(kind, name) for kind, name, _ in moves(found)] == [("stage", "one")]
    assert found.terms["two"].decision is Decision.NOTHING and "namespace ns" in found.terms["two"].why
    assert len(moves(plan(world(*nodes, quotas={"ns": 2 * GB}), one=0.9, two=0.5))) == 2


def test_the_worthiest_goes_into_free_room_one_at_a_time_on_each_node() -> None:
    found = world(node("a", x=Rung.DISK, y=Rung.DISK), node("b", y=Rung.DISK, z=there("z", size=3 * GB)))
    plan_ = plan(found, x=0.2, y=0.1, z=0.1)
    assert moves(plan_) == [("stage", "x", "a"), ("stage", "y", "b")]
    assert "there is room" in plan_.actions[0].reason and "0.2" in plan_.actions[0].reason
    assert plan_.terms["z"].decision is Decision.NOTHING and "one at a time" in plan_.terms["z"].why
    terms = plan_.terms["x"]
    assert (terms.chance, terms.node, terms.bytes, terms.decision) == (0.2, "a", GB, Decision.STAGE)
    assert terms.saved_seconds == pytest.approx(1.0) and terms.worth == pytest.approx(0.2 * 2 / GB)


def test_without_credit_nothing_moves_and_it_says_so() -> None:
    found = world(node("a", x=Rung.DISK))
    plan_ = ahead(found, {"x": 1.0}, earned=False)
    assert plan_.actions == () and "has not shown" in plan_.terms["x"].why


def test_credit_is_earned_by_enough_statements_and_is_not_lost_by_a_little() -> None:
    few, much = {"x": ENOUGH_CREDIT}, {"x": ENOUGH_CREDIT, "y": 0.1}
    assert has_earned(ENOUGH_STATEMENTS, much, False)
    assert not has_earned(ENOUGH_STATEMENTS - 1, much, False)
    assert not has_earned(ENOUGH_STATEMENTS, few, False)
    assert has_earned(ENOUGH_STATEMENTS, {"x": 1.0}, True)
    assert not has_earned(ENOUGH_STATEMENTS, {"x": 1.0, "y": -1.0}, True)


def test_a_model_that_is_foretold_badly_is_passed_over() -> None:
    found = world(node("a", x=Rung.DISK, y=Rung.DISK))
    plan_ = ahead(found, {"x": 0.9, "y": 0.1}, earned=True, credits={"x": -1.0, "y": 20.0})
    assert moves(plan_) == [("stage", "y", "a")]


def test_a_newcomer_displaces_what_is_worth_clearly_less() -> None:
    full = node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK)
    assert moves(plan(world(full), x=0.1, y=0.1 * SWAP * 0.99)) == []
    plan_ = plan(world(full), x=0.1, y=0.1 * SWAP * 1.01)
    assert moves(plan_) == [("drop", "x", "a"), ("stage", "y", "a")]
    assert isinstance(drop := plan_.actions[0], Drop) and drop.rung is Rung.DISK
    assert [plan_.terms[each].decision for each in "xy"] == [Decision.DROP, Decision.STAGE]


@pytest.mark.parametrize(("objective", "first"), [("mean", "small"), ("p99", "large")])
def test_for_the_tail_a_large_model_goes_before_a_small_one(objective: str, first: str) -> None:
    """Six times the bytes, at the same chance, in six times the seconds."""
    found = world(node("a", limit=40 * GB, small=there("small", size=5 * GB), large=there("large", size=30 * GB)))
    chances = {"small": 0.1, "large": 0.1}
    assert moves(ahead(found, chances, earned=True, objective=OBJECTIVES[objective])) == [("stage", first, "a")]


def test_all_that_leaves_counts_together_and_where_least_is_lost_it_goes() -> None:
    two = node("a", limit=2 * GB, x=Rung.MEMORY, y=Rung.MEMORY, big=there("big", size=2 * GB))
    assert moves(plan(world(two), x=0.1, y=0.1, big=0.12)) == []
    other = node("b", limit=2 * GB, v=Rung.MEMORY, w=Rung.MEMORY, big=there("big", size=2 * GB))
    plan_ = plan(world(two, other), x=0.1, y=0.1, v=0.1, w=0.01, big=0.5)
    assert moves(plan_) == [("drop", "w", "b"), ("drop", "v", "b"), ("stage", "big", "b")]


KEPT = {
    "wanted in memory": world(node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK), models=(model("x", Rung.MEMORY),)),
    "pinned": world(node("a", limit=GB, x=there("x", Rung.MEMORY, pinned=Rung.MEMORY), y=Rung.DISK)),
    "to be pinned": world(node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK), models=(model("x", pin=Rung.MEMORY),)),
    "wanted by another model": world(
        node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK), models=(replace(model("also x", Rung.MEMORY), snapshot=name_of("x")),)
    ),
    "asked for": world(node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK), demand={"x": Demand(0, 1, 1)}),
    "with replicas": world(replace(node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK), replicas={"r": Replica("r", "x")})),
    "a standby": world(node("a", limit=GB, x=Rung.STANDBY, y=Rung.DISK)),
    "of a silent source": world(
        node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK), demand={"x": Demand(0, 0, 0, elsewhere=Elsewhere(unknown="redis"))}
    ),
    "on its way": world(
        node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK),
        under_way=(Stage("a", "x", name_of("x"), "digest of x", Rung.DISK, "on its way"),),
    ),
    "nobody's that is known": replace(found := world(node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK)), models={"y": found.models["y"]}),
}


@pytest.mark.parametrize("why", KEPT)
def test_what_is_wanted_pinned_or_used_leaves_for_nobody(why: str) -> None:
    assert moves(plan(KEPT[why], x=0.0001, y=1.0)) == []


NOT_THERE = {
    "cordoned": lambda each: replace(each, standing=Standing(cordoned=True)),
    "silent": lambda each: replace(each, silent=True),
    "not synced": lambda each: replace(each, synced=False),
    "damaged": lambda each: replace(each, residencies={name_of("x"): there("x", unusable="another kernel")}),
    "full of others": lambda each: replace(each, memory_free_bytes=SPARE_BYTES + GB - 1),
    "over its budget": lambda each: replace(each, staged_limit_bytes=GB - 1),
    "without room on its GPU": lambda each: replace(
        each, gpus=(Gpu("g", 80 * GB, GB),), residencies={name_of("x"): there("x", gpu_bytes=(2 * GB,))}
    ),
    "busy with another one": lambda each: replace(each, transfers=(Transfer(name_of("z"), "z", Rung.MEMORY, 1, 2),)),
}


@pytest.mark.parametrize("why", NOT_THERE)
def test_a_node_that_is_unfit_or_full_is_planned_around(why: str) -> None:
    bad, good = NOT_THERE[why](node("a", x=Rung.DISK)), node("b", x=there("x", size=GB))
    assert moves(plan(world(bad), x=1.0)) == []
    assert moves(plan(world(bad, good), x=1.0)) == [("stage", "x", "b")]


BUSY: dict[str, dict[str, Any]] = {
    "requests wait for what it has": {"demand": {"w": Demand(1, 0, 0)}},
    "an urgent staging": {"under_way": (Stage("a", "w", name_of("w"), "digest of w", Rung.MEMORY, "waits", urgent=True),)},
    "an urgent fetch": {"under_way": (Stage("a", "w", name_of("w"), "digest of w", Rung.DISK, "waits", urgent=True),)},
    "a start": {"under_way": (Start("w", "a", "wanted"),)},
    "a drop": {"under_way": (Drop("a", "w", name_of("w"), "digest of w", Rung.DISK, "less"),)},
    "a pod that waits": {"arriving": {"w": ["a"]}},
}


@pytest.mark.parametrize("why", BUSY)
def test_a_waiting_request_and_work_in_progress_come_first(why: str) -> None:
    found = world(node("a", x=Rung.DISK, w=Rung.DISK), node("b", y=Rung.DISK), **BUSY[why])
    assert moves(plan(found, x=1.0, y=0.1)) == [("stage", "y", "b")], "other nodes go on"


def test_what_stands_or_comes_to_stand_in_memory_gets_no_second_copy() -> None:
    assert moves(plan(world(node("a", x=Rung.MEMORY), node("b", x=Rung.DISK)), x=1.0)) == []
    cordoned = replace(node("a", x=Rung.MEMORY), standing=Standing(cordoned=True))
    assert moves(plan(world(cordoned, node("b", x=Rung.DISK)), x=1.0)) == [("stage", "x", "b")], "no pod goes to the other one"
    comes = Stage("a", "x", name_of("x"), "digest of x", Rung.MEMORY, "ahead of need")
    assert moves(plan(world(node("a", x=Rung.DISK), node("b", x=Rung.DISK), under_way=(comes,)), x=1.0)) == []


def test_what_was_moved_or_refused_lately_is_left() -> None:
    full = world(node("a", limit=GB, x=Rung.MEMORY, y=Rung.DISK))
    chances = {"x": 0.01, "y": 1.0}
    for digest in ("digest of x", "digest of y"):
        moved = {("a", digest): NOW - LEFT_SECONDS + 1}
        assert ahead(full, chances, earned=True, moved=moved).actions == ()
        assert ahead(replace(full, now=NOW + 1), chances, earned=True, moved=moved).actions
    refused = replace(full, put_off={("a", "digest of y", Rung.MEMORY): NOW + 1})
    assert moves(plan(refused, **chances)) == []


def test_owners_wishes_are_the_policy_s_and_models_without_a_chance_stay_where_they_are() -> None:
    found = world(
        node("a", wanted=Rung.DISK, unknown=Rung.DISK, slow=Rung.DISK, other=Rung.DISK),
        models=(model("wanted", Rung.MEMORY), model("slow", longest_staging=0.5), model("other", digest="another"), Model("cold")),
    )
    plan_ = plan(found, wanted=1.0, slow=1.0, other=1.0, cold=1.0)
    assert plan_.actions == () and set(plan_.terms) == set(found.models)
    assert "its owner wants it" in plan_.terms["wanted"].why and "longer than its owner" in plan_.terms["slow"].why
    assert moves_nothing({"wanted": found.models["wanted"], "cold": Model("cold")}) and not moves_nothing(found.models)


LENT = {"weights_bytes": 4 * GB, "weights_rung": WeightsRung.DISK}


def lending(address: str, room: int | None, **has: Residency) -> Node:
    """A node whose gpumem has room for weights of so many bytes."""
    return replace(node(address, **has), weights_room_bytes=room)


def test_a_model_is_worth_its_image_and_its_weights_together() -> None:
    plan_ = plan(world(lending("a", 4 * GB, x=there("x", **LENT))), x=0.1)
    terms = plan_.terms["x"]
    assert moves(plan_) == [("stage", "x", "a")] and terms.bytes == 5 * GB
    assert terms.saved_seconds == pytest.approx(5.0, rel=0.1), "weights come from the disk, too"
    up = there("x", weights_bytes=4 * GB, weights_rung=WeightsRung.GPU)
    terms = plan(world(lending("a", 0, x=up)), x=0.1).terms["x"]
    assert terms.bytes == GB and terms.saved_seconds == pytest.approx(1.0), "they stand there"
    ranks = there("x", **LENT, gpu_bytes=(GB, GB))
    two = replace(lending("a", 4 * GB, x=ranks), gpus=(Gpu("g", 80 * GB, 80 * GB), Gpu("h", 80 * GB, 80 * GB)))
    assert plan(world(two), x=0.1).terms["x"].bytes == 9 * GB


def test_weights_that_have_left_an_image_in_memory_are_brought_back() -> None:
    half = there("x", Rung.MEMORY, **LENT)
    plan_ = plan(world(lending("a", 4 * GB, x=half), node("b", x=there("x", **LENT))), x=0.1)
    assert moves(plan_) == [("stage", "x", "a")] and plan_.terms["x"].bytes == 4 * GB, "less is to come than on the other node"
    assert moves(plan(world(lending("a", 0, x=half)), x=0.1)) == [], "there is no room, and nothing that could leave"
    standby = there("x", Rung.STANDBY, **LENT)
    assert moves(plan(world(lending("a", 4 * GB, x=standby)), x=0.1)) == [("stage", "x", "a")]


def test_weights_leave_for_weights_that_are_worth_more_and_only_for_these() -> None:
    stands = {"weights_bytes": 4 * GB, "weights_rung": WeightsRung.GPU}
    full = lending("a", GB, x=there("x", Rung.MEMORY, **stands), y=there("y", **LENT))
    assert moves(plan(world(full), x=0.1, y=0.1)) == []
    plan_ = plan(world(full), x=0.01, y=0.1)
    assert moves(plan_) == [("drop", "x", "a"), ("stage", "y", "a")]
    assert isinstance(drop := plan_.actions[0], Drop) and drop.weights
    alone = lending("a", GB, x=there("x", **stands), y=there("y", **LENT))
    assert moves(plan(world(alone), x=0.01, y=0.1)) == [("drop", "x", "a"), ("stage", "y", "a")], "weights whose image is on disk"
    short_of_memory = replace(full, weights_room_bytes=8 * GB, staged_limit_bytes=GB)
    assert isinstance(drop := plan(world(short_of_memory), x=0.01, y=0.1).actions[0], Drop) and not drop.weights


def test_an_agent_that_says_nothing_of_its_room_for_weights_sees_to_them_itself() -> None:
    assert moves(plan(world(lending("a", None, x=there("x", **LENT))), x=0.1)) == [("stage", "x", "a")]


def test_of_models_with_one_snapshot_the_likeliest_asks_for_it() -> None:
    also = replace(model("also"), snapshot=name_of("x"))
    plan_ = plan(world(node("a", x=Rung.DISK), node("b", x=Rung.DISK), models=(also,)), x=0.1, also=0.5)
    assert moves(plan_) == [("stage", "also", "a")] and "also's, too" in plan_.terms["x"].why


SIZES = st.integers(1, 4 * GB)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, dict[str, float]]:
    names = [f"m{number}" for number in range(draw(st.integers(1, 8)))]
    models = {
        name: model(name, draw(st.sampled_from([Rung.DISK, Rung.DISK, Rung.MEMORY])), pin=draw(st.sampled_from([Rung.ABSENT, Rung.MEMORY])))
        for name in names
    }
    sizes = {name: draw(SIZES) for name in names}
    weights = {name: draw(st.just(0) | SIZES) for name in names}
    nodes = []
    for number in range(draw(st.integers(1, 4))):
        has = {
            name: there(
                name,
                draw(st.sampled_from([Rung.DISK, Rung.MEMORY])),
                sizes[name],
                pinned=draw(st.sampled_from(list(Rung)[:3])),
                weights_bytes=weights[name],
                weights_rung=draw(st.sampled_from(list(WeightsRung)[1:])) if weights[name] else WeightsRung.ABSENT,
            )
            for name in draw(st.sets(st.sampled_from(names)))
        }
        made = node(f"n{number}", limit=draw(st.integers(0, 12 * GB)), **has)
        nodes.append(replace(made, weights_room_bytes=draw(st.none() | st.integers(0, 8 * GB))))
    chances = {name: draw(st.floats(0.0, 1.0)) for name in names}
    demand = {name: Demand(0, 1, 1) for name in draw(st.sets(st.sampled_from(names), max_size=2))}
    return World(NOW, models, tuple(nodes), demand), chances


@settings(deadline=None)
@given(worlds())
def test_never_over_the_budget_and_never_what_is_pinned_or_wanted(drawn: tuple[World, dict[str, float]]) -> None:
    found, chances = drawn
    plan_ = ahead(found, chances, earned=True)
    by_address = {each.address: each for each in found.nodes}
    stages = [each for each in plan_.actions if isinstance(each, Stage)]
    assert len({each.node for each in stages}) == len(stages), "one at a time"
    assert len({each.snapshot for each in stages}) == len(stages), "no second copy"
    for stage in stages:
        on = by_address[stage.node]
        drops = [each for each in plan_.actions if isinstance(each, Drop) and each.node == stage.node]
        left = [standing(on.residencies[each.snapshot]) for each in drops]
        comes = coming(on.residencies[stage.snapshot])
        assert on.staged_bytes is not None and on.staged_limit_bytes is not None
        if comes.size.image:
            assert on.staged_bytes - sum(each.size.image for each in left) + comes.size.image <= on.staged_limit_bytes
        if comes.size.weights and on.weights_room_bytes is not None:
            freed = sum(step.size.weights for step, drop in zip(left, drops, strict=True) if drop.weights)
            assert comes.size.weights <= on.weights_room_bytes + freed
        lost = sum(plan_.terms[drop.model].worth * step.bytes for step, drop in zip(left, drops, strict=True))
        terms = plan_.terms[stage.model]
        assert lost * SWAP <= terms.worth * terms.bytes * 1.000001
    for drop in (each for each in plan_.actions if isinstance(each, Drop)):
        residency, wish = by_address[drop.node].residencies[drop.snapshot], found.models[drop.model]
        assert residency.pinned < Rung.MEMORY and wish.pin < Rung.MEMORY and wish.stage < Rung.MEMORY
        assert drop.model not in found.demand and any(each.node == drop.node for each in stages)


@settings(deadline=None)
@given(worlds())
def test_the_same_world_gives_the_same_plan_in_whatever_order(drawn: tuple[World, dict[str, float]]) -> None:
    found, chances = drawn
    turned = replace(found, nodes=tuple(reversed(found.nodes)), models=dict(reversed(list(found.models.items()))))
    first, second = ahead(found, chances, earned=True), ahead(turned, dict(reversed(list(chances.items()))), earned=True)
    assert first == second


@settings(deadline=None)
@given(worlds())
def test_what_was_done_is_not_undone_by_the_next_look(drawn: tuple[World, dict[str, float]]) -> None:
    """The world as it is once all was carried out, long after: nothing that was staged leaves for what it has displaced."""
    found, chances = drawn
    plan_ = ahead(found, chances, earned=True)
    nodes = {each.address: each for each in found.nodes}
    for action in plan_.actions:
        on = nodes[action.node]
        before = on.residencies[action.snapshot]
        if isinstance(action, Stage):
            step = coming(before)
            after, room = step.above, -step.size.weights
        else:
            step = standing(before)
            after, room = (step.below, step.size.weights) if action.weights else (replace(before, rung=Rung.DISK), 0)
        moved = {**on.residencies, action.snapshot: after}
        staged = sum(each.image_bytes for each in moved.values() if each.rung >= Rung.MEMORY)
        left = None if on.weights_room_bytes is None else int(on.weights_room_bytes + room)
        nodes[action.node] = replace(on, residencies=moved, staged_bytes=staged, weights_room_bytes=left)
    later = ahead(replace(found, nodes=tuple(nodes.values()), now=NOW + 10 * LEFT_SECONDS), chances, earned=True)
    undone = {(each.node, each.snapshot) for each in plan_.actions if isinstance(each, Drop)}
    for stage in (each for each in later.actions if isinstance(each, Stage)):
        if (stage.node, stage.snapshot) in undone:
            out = [each.snapshot for each in later.actions if isinstance(each, Drop) and each.node == stage.node]
            assert not {each.snapshot for each in plan_.actions if isinstance(each, Stage) and each.node == stage.node} & set(out)
