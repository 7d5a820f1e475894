"""A node as it is shown, and who of all nodes has which snapshot."""

from dataclasses import replace

import pytest

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.scheduling import ZONE, Standing
from scaler.plan.world import Node, Residency, Transfer
from scaler.view.node_state import Copies, NodeStates
from scaler.view.state import Move, RungUse

CHAT, DRAW = SnapshotName("team", "chat"), SnapshotName("team", "draw")
IN_MEMORY = Residency("d1", Rung.MEMORY, 100, weights_bytes=50, weights_rung=WeightsRung.GPU, gpu_bytes=(10, 10))
ON_DISK = Residency("d2", Rung.DISK, 7)


async def no_pace() -> None:
    """Nobody waits."""


async def test_what_stands_on_each_rung() -> None:
    node = Node("a:1", "one", residencies={CHAT: replace(IN_MEMORY, gpu_bytes=()), DRAW: ON_DISK})
    (shown,) = await NodeStates().of([node], Copies({}), no_pace)
    assert shown.rungs == {"memory": RungUse(1, 100, 0), "disk": RungUse(1, 7, 0), "gpu": RungUse(0, 0, 50)}
    assert [(copy.snapshot, copy.rung, copy.weights_rung) for copy in shown.copies] == [
        ("team/chat", "memory", "gpu"),
        ("team/draw", "disk", None),
    ]


async def test_weights_of_several_gpus_count_for_each() -> None:
    (shown,) = await NodeStates().of([Node("a:1", residencies={CHAT: IN_MEMORY})], Copies({}), no_pace)
    (copy,) = shown.copies
    assert (copy.weights_bytes, copy.gpu_bytes, copy.seconds_to_serve) == (100, 20, None), "it has no GPU that would have room"
    assert shown.name == "a:1", "its agent has not said its name"


async def test_how_its_cluster_has_it_and_what_is_on_its_way() -> None:
    standing = Standing(labels={ZONE: "b"}, cordoned=True)
    transfers = (Transfer(CHAT, "d1", Rung.DISK, 1, 2, since=5.0), Transfer(DRAW, "d2", Rung.MEMORY, 3, 4, since=6.0))
    (shown,) = await NodeStates().of([Node("a:1", "one", standing=standing, transfers=transfers)], Copies({}), no_pace)
    assert (shown.cordoned, shown.zone) == (True, "b")
    assert shown.moves == (Move("team/chat", "remote", "disk", 1, 2, 5.0), Move("team/draw", "disk", "memory", 3, 4, 6.0))


@pytest.mark.parametrize(
    ("stands", "goes", "above", "to"),
    [
        (WeightsRung.DISK, WeightsRung.MEMORY, "disk", "arena"),
        (WeightsRung.DISK, WeightsRung.GPU, "disk", "gpu"),
        (WeightsRung.MEMORY, WeightsRung.GPU, "arena", "gpu"),
    ],
)
async def test_weights_on_their_way_are_a_move_of_their_own(stands: WeightsRung, goes: WeightsRung, above: str, to: str) -> None:
    there = {CHAT: replace(IN_MEMORY, weights_rung=stands)}
    ways = (Transfer(CHAT, "d1", Rung.ABSENT, 1, 2, since=5.0, weights_rung=goes), Transfer(CHAT, "d1", Rung.MEMORY, 3, 4, since=6.0))
    (shown,) = await NodeStates().of([Node("a:1", "one", residencies=there, transfers=ways)], Copies({}), no_pace)
    assert shown.moves == (Move("team/chat", above, to, 1, 2, 5.0), Move("team/chat", "disk", "memory", 3, 4, 6.0))


async def test_who_has_a_snapshot_and_why_it_stands_no_higher() -> None:
    nodes = [
        Node("b:1", "two", residencies={CHAT: replace(IN_MEMORY, gpu_bytes=(), unusable="it is of another driver")}),
        Node("a:1", "one", residencies={CHAT: replace(IN_MEMORY, gpu_bytes=(), rung=Rung.PARKED)}),
        Node("c:1", "three"),
    ]
    why = {("b:1", "d1", Rung.STANDBY): "no room", ("c:1", "d1", Rung.DISK): "the disk is full", ("c:1", "d9", Rung.DISK): "it is gone"}
    copies = Copies(why)
    shown = await NodeStates().of(nodes, copies, no_pace)
    copies.complete()
    assert [node.name for node in shown] == ["one", "three", "two"]
    there = copies.of(CHAT)
    assert (there.nodes, there.best, there.unusable) == (2, Rung.PARKED, ["it is of another driver"])
    assert there.refused == ["not a standby: no room", "not fetched: the disk is full"]
    assert there.soonest is not None and there.soonest == shown[0].copies[0].seconds_to_serve
    assert (copies.called("d1"), copies.called("d9")) == (CHAT, None)
    assert (copies.of(DRAW).nodes, copies.of(None).soonest) == (0, None)


async def test_a_node_of_which_nothing_was_heard_is_not_gone_through_again() -> None:
    quiet, busy = Node("a:1", "one", residencies={CHAT: ON_DISK}), Node("b:1", "two", residencies={CHAT: ON_DISK})
    states = NodeStates()
    first = await states.of([quiet, busy], Copies({}), no_pace)
    copies = Copies({})
    again = await states.of([quiet, replace(busy, memory_free_bytes=5)], copies, no_pace)
    assert again[0] is first[0]
    assert again[1].memory.free_bytes == 5
    assert copies.of(CHAT).nodes == 2, "who has what is put together each time"
    assert await states.of([], Copies({}), no_pace) == ()
