"""`zerowake status` as tables, and as one line per change."""

import io
from dataclasses import replace

from rich.console import Console

from scaler.view.state import (
    Activation,
    Copy,
    Gpu,
    Memory,
    Model,
    Move,
    Node,
    Origin,
    Phase,
    Plan,
    Presence,
    Rates,
    Replica,
    Replicas,
    ReplicaState,
    Source,
    State,
)
from scaler.view.status_shown import changes, view

GPU = Gpu("GPU-1", "NVIDIA H200", 9 << 30, 4 << 30, unused_bytes=3 << 30, pool_bytes=0, parked_bytes=1 << 30, others_bytes=None)
NODE = Node(
    name="one",
    address="a:1",
    presence=Presence.HEARD,
    cordoned=False,
    zone=None,
    memory=Memory(16 << 30, 8 << 30, staged_bytes=1 << 30, staged_limit_bytes=None),
    gpus=(GPU, replace(GPU, uuid="GPU-2", model=None)),
    rates=Rates(None, None, None, None, None),
    rungs={},
    moves=(Move("team/far", "remote", "disk", 1 << 30, 4 << 30, since=0.0),),
    sources=(Origin("s3://b", None, "403 Forbidden"), Origin("agent a:1", 2e9, None)),
    copies=(Copy("team/chat", "memory", 1, None, 0, 0, "memory", 0.1, None), Copy("team/draw", "disk", 1, None, 0, 0, None, 0.1, None)),
)
CHAT = Model(
    name="chat",
    namespace=None,
    snapshot="team/chat",
    stage="memory",
    rung="memory",
    pinned="memory",
    copies=1,
    copies_wanted=1,
    replicas=Replicas(ready=1, draining=0, sleeping=0, wanted=2, limit=2),
    held=3,
    held_limit=10,
    held_bytes=0,
    in_flight=4,
    elsewhere=0,
    rate=0.0,
    next_likely_seconds=None,
    seconds_to_serve=0.1,
    failure="no room",
    refused=None,
    unusable=None,
    sources=(Source("redis", "the list jobs", 3, None, 1.5, up=True, fault=None),),
)
STARTED = Activation("0a", "chat", "served", None, "parked", 0.0, 1.5, (Phase("held", 0.0, 0.5),), 1.0)
STATE = State(
    at=0.0,
    version="1",
    instance="i",
    leads=True,
    missing=None,
    models=(CHAT,),
    nodes=(NODE,),
    replicas=(Replica("r1", "chat", "one", "parked", ReplicaState.SLEEPING, "standby", 2, None),),
    plan=Plan((), ()),
    activations=(STARTED,),
)
SECOND = replace(NODE, name="two", presence=Presence.SILENT, cordoned=True, moves=(), sources=())


def shown(state: State) -> list[str]:
    """Its lines, with one space between words."""
    console = Console(file=io.StringIO(), width=1000, markup=False, highlight=False)
    console.print(view(state))
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def told(before: State | None, state: State) -> list[str]:
    """What is said, without the time."""
    return [line.partition(" ")[2] for line in changes(before, state)]


def test_models_and_who_asks_for_them() -> None:
    said = shown(STATE)
    assert said[:2] == [
        "MODEL SNAPSHOT RUNG WANTED READY HELD IN FLIGHT NOTE",
        "chat team/chat memory (pinned: memory) 2 1 3 4 no room",
    ]
    assert "redis: the list jobs chat 3 - 2 s" in said
    cold = replace(CHAT, name="cold", snapshot=None, failure=None, replicas=replace(CHAT.replicas, wanted=None))
    far = replace(CHAT, name="far", snapshot="team/far", unusable="it is of another driver", failure=None)
    said = shown(replace(STATE, models=(cold, far)))
    assert "cold - - - 1 3 4" in said and "far team/far absent 2 1 3 4 it is of another driver" in said


def test_what_a_node_has_and_what_is_not_known_of_it() -> None:
    said = shown(STATE)
    assert "one 8.0 GiB of 16.0 GiB 1.0 GiB NVIDIA H200 3.0 GiB 0.0 GiB 1.0 GiB -" in said
    assert "GPU-2 3.0 GiB 0.0 GiB 1.0 GiB -" in said
    assert "team/far one disk 1.0 GiB of 4.0 GiB" in said
    assert "s3://b one - 403 Forbidden" in said and "agent a:1 one 2000 MB/s" in said
    limited = replace(NODE, memory=replace(NODE.memory, staged_limit_bytes=4 << 30))
    assert any("1.0 GiB of 4.0 GiB NVIDIA" in line for line in shown(replace(STATE, nodes=(limited,))))


def test_of_several_nodes_it_is_said_on_how_many_a_snapshot_stands() -> None:
    said = shown(replace(STATE, nodes=(NODE, SECOND)))
    assert "chat team/chat memory 2 (pinned: memory 2) 2 1 3 4 no room" in said
    assert any(line.startswith("two (silent, cordoned) 8.0 GiB") for line in said)


def test_replicas_and_activations() -> None:
    said = shown(STATE)
    assert "r1 one sleeping (standby) parked 2" in said
    assert any(line.startswith("0a chat") and line.endswith("served parked 1.500 held 500 unaccounted 1000") for line in said)
    left = replace(STARTED, outcome="abandoned", reason="the client left", phases=(), origin=None)
    assert any(line.endswith("abandoned - 1.500 the client left") for line in shown(replace(STATE, activations=(left,))))


def test_what_is_not_whole_says_so() -> None:
    assert shown(replace(STATE, missing="nothing was heard of its peers"))[0] == "not whole: nothing was heard of its peers"


def test_at_first_each_thing_has_its_line_but_what_has_ended() -> None:
    assert told(None, STATE) == [
        "model chat: 1 ready, 3 held, 4 in flight, memory (pinned: memory); no room",
        "node one: heard",
        "team/far on one: on its way to disk",
        "replica r1 of chat: sleeping, parked on one",
    ]


def test_then_what_changes_has_one() -> None:
    assert told(STATE, replace(STATE, at=5.0)) == []
    served = replace(CHAT, held=0, failure=None)
    after = replace(STATE, models=(served,), nodes=(replace(NODE, moves=(), presence=Presence.UNHEARD),), replicas=())
    assert told(STATE, after) == [
        "model chat: 1 ready, 0 held, 4 in flight, memory (pinned: memory)",
        "node one: unheard",
        "team/far on one: gone",
        "replica r1 of chat: gone",
    ]


def test_an_activation_has_a_line_as_it_begins_and_as_it_ends() -> None:
    running = replace(STARTED, id="0b", outcome="open", seconds=0.2, unaccounted_seconds=None, origin=None)
    assert told(STATE, replace(STATE, activations=(running, STARTED))) == ["activation 0b of chat: open"]
    longer = replace(running, seconds=0.4)
    assert told(replace(STATE, activations=(running,)), replace(STATE, activations=(longer,))) == []
    served = replace(running, outcome="served", seconds=0.5, unaccounted_seconds=0.0, origin="restored")
    assert told(replace(STATE, activations=(longer,)), replace(STATE, activations=(served,))) == [
        "activation 0b of chat: served in 0.500 s (restored: held 500 unaccounted 0)"
    ]
