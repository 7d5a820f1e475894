"""Small worlds for tests of the plan: one model, its snapshot, and nodes of which a test says what matters to it."""

from __future__ import annotations

from dataclasses import replace

from scaler.books.demand import Demand
from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import Stage
from scaler.plan.policy import decide
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, Replica, Residency, World

GB = 10**9
NAME = SnapshotName("ns", "chat")
CHAT = Model("chat", NAME)
WAITS = {"chat": Demand(3, 0, 0)}


def node(address: str, rung: Rung | None = Rung.MEMORY, *, free: int = 10 * GB, size: int = GB, **changes: object) -> Node:
    residencies = {} if rung is None else {NAME: Residency("d" * 64, rung, size)}
    return replace(Node(address, address, True, 100 * GB, free, residencies=residencies), **changes)  # type: ignore[arg-type]


def serving(where: Node, *ids: str) -> Node:
    return replace(where, replicas={each: Replica(each, "chat") for each in ids})


def world(*nodes: Node, model: Model = CHAT, **changes: object) -> World:
    return replace(World(100.0, {"chat": model}, nodes), **changes)  # type: ignore[arg-type]


def stages(found: World) -> list[tuple[str, Rung]]:
    return [(action.node, action.rung) for action in decide(found).actions if isinstance(action, Stage)]
