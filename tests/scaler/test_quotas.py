"""What namespaces may have of nodes' memory ahead of requests, world by world."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import Stage
from scaler.plan.policy import decide
from scaler.plan.quotas import Room
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, Residency, World
from tests.worlds.planned import GB, WAITS

ONE, TWO, OTHER = SnapshotName("team", "one"), SnapshotName("team", "two"), SnapshotName("other", "one")
MODELS = {
    "one": Model("one", ONE),
    "two": Model("two", TWO, stage=Rung.STANDBY),
    "other": Model("other", OTHER),
}


def there(rung: Rung, size: int = GB) -> Residency:
    return Residency("d" * 64, rung, size)


def node(address: str = "a", **rungs: Rung) -> Node:
    """`rungs`: of the snapshots of the models of those names."""
    has = {name: there(rungs[model]) for model, name in (("one", ONE), ("two", TWO), ("other", OTHER)) if model in rungs}
    return Node(address, address, True, 100 * GB, 90 * GB, residencies=has)


def world(*nodes: Node, **changes: object) -> World:
    return replace(World(100.0, MODELS, nodes), **changes)  # type: ignore[arg-type]


def staged(found: World) -> list[tuple[str, str, Rung]]:
    return [(each.model, each.node, each.rung) for each in decide(found).actions if isinstance(each, Stage)]


def test_without_a_quota_all_goes_where_its_owner_wants_it() -> None:
    assert staged(world(node(one=Rung.DISK), node("b", one=Rung.DISK))) == [("one", "a", Rung.MEMORY), ("one", "b", Rung.MEMORY)]
    assert Room(world()).left("team") == math.inf


def test_at_its_quota_a_namespace_gets_no_more_and_others_do() -> None:
    nodes = node(one=Rung.DISK, two=Rung.DISK, other=Rung.DISK), node("b", one=Rung.DISK)
    plan = decide(found := world(*nodes, quotas={"team": 2 * GB}))
    assert staged(found) == [("one", "a", Rung.MEMORY), ("one", "b", Rung.MEMORY), ("other", "a", Rung.MEMORY)]
    ((barred, why),) = plan.barred.items()
    assert (barred.model, barred.rung) == ("two", Rung.MEMORY)
    assert "may hold 1907 MiB of namespace team" in why and "memory_quotas" in why


@pytest.mark.parametrize(("quota", "goes"), [(3 * GB, True), (3 * GB - 1, False)])
def test_a_standby_takes_its_image_once_more(quota: int, goes: bool) -> None:
    found = world(node(one=Rung.MEMORY, two=Rung.MEMORY), quotas={"team": quota})
    assert staged(found) == ([("two", "a", Rung.STANDBY)] if goes else [])
    assert Room(world(node(two=Rung.STANDBY), quotas={"team": quota})).left("team") == quota - 2 * GB
    assert Room(world(node(two=Rung.PARKED), quotas={"team": quota})).left("team") == quota - 2 * GB


def test_what_stands_lower_is_free_and_what_is_on_its_way_is_not() -> None:
    quotas = {"team": GB}
    assert staged(world(node(one=Rung.DISK), quotas=quotas)) == [("one", "a", Rung.MEMORY)]
    (on_its_way,) = decide(world(node(one=Rung.DISK), quotas=quotas)).actions
    nodes = node(one=Rung.DISK), node("b", one=Rung.DISK, two=Rung.DISK)
    assert staged(world(*nodes, quotas=quotas, under_way=(on_its_way,))) == []


def test_a_request_s_own_way_is_never_barred_and_counts() -> None:
    nodes = node(one=Rung.DISK, two=Rung.DISK)
    asked = {"one": WAITS["chat"]}
    assert staged(world(nodes, demand=asked, quotas={"team": 0})) == [("one", "a", Rung.MEMORY)]
    assert Room(world(node(one=Rung.MEMORY), quotas={"team": GB // 2})).left("team") < 0


def test_every_namespace_that_is_not_named_has_the_same() -> None:
    nodes = node(one=Rung.DISK, other=Rung.DISK)
    assert staged(world(nodes, quotas={"*": 0})) == []
    assert staged(world(nodes, quotas={"*": 0, "team": GB})) == [("one", "a", Rung.MEMORY)]


def test_why_it_goes_no_higher() -> None:
    room = Room(world(node(one=Rung.MEMORY), quotas={"team": GB}))
    assert "namespace team" in room.why_no_higher(TWO, there(Rung.DISK))
    assert room.why_no_higher(TWO, there(Rung.PARKED)) == "" and room.why_no_higher(OTHER, there(Rung.DISK)) == ""
