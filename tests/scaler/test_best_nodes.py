"""Which node makes a replica, of those that would serve it about as soon."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import Stage, Start
from scaler.plan.best_nodes import best_nodes, seconds_on
from scaler.plan.estimate import seconds_to_serve
from scaler.plan.policy import decide
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, Rates, Residency, World
from tests.worlds.planned import GB, NAME, WAITS, node, stages, world

OTHERS = [SnapshotName("ns", name) for name in ("first", "second", "third")]
SLOW, FAST = Rates(disk_to_memory=1e9), Rates(disk_to_memory=1.1e9)


def full(address: str, *others: SnapshotName, **changes: object) -> Node:
    """It has the snapshot on disk, and these in memory, which has room for no other one."""
    there = {other: Residency(other.name, Rung.MEMORY, GB) for other in others}
    found = node(address, Rung.DISK, staged_bytes=len(others) * GB, staged_limit_bytes=len(others) * GB, **changes)
    return replace(found, residencies={**found.residencies, **there})


def empty(address: str, **changes: object) -> Node:
    return node(address, Rung.DISK, staged_bytes=0, staged_limit_bytes=2 * GB, **changes)


def best(found: World) -> str:
    """The node that stages for a request, which has to be the one that makes the replica, too."""
    (staged,) = [action.node for action in decide(found).actions if isinstance(action, Stage)]
    (started,) = [action.node for action in decide(one_wanted(found)).actions if isinstance(action, Start)]
    assert started == staged
    return staged


def one_wanted(found: World) -> World:
    return replace(found, models={name: replace(model, replicas=1) for name, model in found.models.items()})


def asked(*nodes: Node, **changes: object) -> World:
    return world(*nodes, model=Model("chat", NAME, stage=Rung.DISK), demand=WAITS, **changes)


def test_memory_that_is_empty_is_used_before_an_image_has_to_leave() -> None:
    assert best(asked(full("a", OTHERS[0], rates=FAST), empty("b", rates=SLOW))) == "b"
    assert best(asked(full("a", OTHERS[0], rates=FAST), full("b", OTHERS[1], rates=SLOW))) == "a", "where all is alike, the estimate"


def test_of_all_nodes_the_image_leaves_that_was_asked_for_least_lately() -> None:
    nodes = full("a", OTHERS[0], rates=FAST), full("b", OTHERS[1], rates=SLOW), full("c", OTHERS[2], rates=SLOW)
    lately = {OTHERS[0]: 90.0, OTHERS[1]: 50.0, OTHERS[2]: math.inf}
    assert best(asked(*nodes, asked_at=lately)) == "b"
    assert best(asked(*nodes, asked_at={**lately, OTHERS[1]: 95.0})) == "a"
    assert best(asked(*nodes, asked_at={OTHERS[0]: 90.0, OTHERS[2]: 80.0})) == "b", "nobody ever asked for that one"


def test_where_it_stands_already_nothing_is_moved() -> None:
    there = node("a", Rung.MEMORY, staged_bytes=GB, staged_limit_bytes=GB)
    nearly = node("b", Rung.DISK, rates=Rates(disk_to_memory=1e12), staged_bytes=0, staged_limit_bytes=GB)
    found = one_wanted(asked(nearly, there))
    assert [action.node for action in decide(found).actions if isinstance(action, Start)] == ["a"]
    assert stages(found) == []


def test_what_is_begun_on_a_node_is_not_begun_on_another() -> None:
    found = asked(full("a", OTHERS[0], rates=FAST), empty("b", rates=SLOW))
    (stage,) = [action for action in decide(found).actions if isinstance(action, Stage)]
    filled = replace(empty("b", rates=SLOW), staged_bytes=2 * GB)
    assert stages(asked(full("a", OTHERS[0], rates=FAST), filled, under_way=(stage,))) == []


def test_two_that_come_at_once_go_to_two_nodes() -> None:
    (other,) = OTHERS[:1]
    nodes = [replace(each, residencies={**each.residencies, other: Residency("o", Rung.DISK, 2 * GB)}) for each in (empty("a"), empty("b"))]
    coming = Stage("a", "first", other, "o", Rung.MEMORY, "")
    assert best(asked(*nodes)) == "a"
    assert best(asked(*nodes, under_way=(coming,))) == "b"


def test_one_that_is_clearly_sooner_is_taken_whatever_has_to_leave() -> None:
    assert best(asked(full("a", OTHERS[0], rates=Rates(disk_to_memory=4e9)), empty("b", rates=SLOW))) == "a"


@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.booleans(), st.floats(0.0, 99.0)), min_size=1, max_size=6))
def test_none_is_chosen_that_serves_clearly_later_than_another(drawn: list[tuple[float, bool, float]]) -> None:
    nodes, at = [], {}
    for number, (rate, is_full, asked_at) in enumerate(drawn):
        other, rates = SnapshotName("ns", f"other-{number}"), Rates(disk_to_memory=rate * 1e9)
        at[other] = asked_at
        nodes.append(full(str(number), other, rates=rates) if is_full else empty(str(number), rates=rates))
    found = best_nodes(world(*nodes, asked_at=at), [(each, each.residencies[NAME]) for each in nodes])
    seconds = {node.address: seconds_to_serve(node, there) for node, there, _ in found}
    assert sorted(seconds) == sorted(each.address for each in nodes)
    assert seconds[found[0][0].address] <= 1.5 * min(seconds.values()) + 0.05


def test_one_that_never_could_is_no_place() -> None:
    there = replace(node("a").residencies[NAME], unusable="another kernel")
    assert best_nodes(world(), [(node("a"), there)]) == []


def test_what_nobody_has_tried_is_not_taken_for_faster() -> None:
    """Restores take 0.3 s where they were made; an own guess of the one that made none would be far below that."""
    there = Residency("d", Rung.MEMORY, GB // 100, overhead_seconds=0.3)
    tried = replace(node("a", Rung.MEMORY), residencies={NAME: there}, rates=Rates(1e9, 2e9, 3e9, 4e9, 5e9))
    untried = replace(node("b", Rung.DISK), residencies={NAME: replace(there, rung=Rung.DISK, overhead_seconds=0.0)})
    assert [found.address for found, _, _ in best_nodes(world(), [(untried, untried.residencies[NAME]), (tried, there)])] == ["a", "b"]
    seconds = seconds_on([(untried, untried.residencies[NAME]), (tried, there)])
    assert seconds[0] == seconds_to_serve(replace(tried, residencies={}), replace(there, rung=Rung.DISK))
