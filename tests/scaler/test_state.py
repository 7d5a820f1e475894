"""The typed state as JSON: every field by its name, in a golden file that whoever reads the JSON can rely upon."""

import dataclasses
import json
from pathlib import Path

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
    RungUse,
    Source,
    State,
    Step,
    as_json,
    decoded,
    encoded,
)

GOLDEN = Path(__file__).parent / "golden" / "state.json"

CHAT = Model(
    name="chat",
    namespace="team",
    snapshot="team/chat",
    stage="memory",
    rung="memory",
    pinned="disk",
    copies=1,
    copies_wanted=2,
    replicas=Replicas(ready=1, draining=0, sleeping=1, wanted=2, limit=4),
    held=3,
    held_limit=10_000,
    held_bytes=1024,
    in_flight=8,
    elsewhere=5,
    rate=2.5,
    next_likely_seconds=0.0,
    seconds_to_serve=0.42,
    failure="no room",
    refused="not parked: no GPU has room",
    unusable=None,
    sources=(Source("redis", "list jobs at redis:6379", pending=5, replicas=0, age_seconds=1.5, up=True, fault=None),),
)
NODE = Node(
    name="gpu-1",
    address="10.0.0.1:9446",
    presence=Presence.HEARD,
    cordoned=False,
    zone="a",
    memory=Memory(total_bytes=1 << 37, free_bytes=1 << 36, staged_bytes=1 << 34, staged_limit_bytes=1 << 35),
    gpus=(Gpu("GPU-1", "NVIDIA H100", 80 << 30, 60 << 30, 20 << 30, 40 << 30, 2 << 30, None),),
    rates=Rates(1e9, 2e9, 4e9, None, 2e10),
    rungs={"memory": RungUse(images=1, image_bytes=1 << 33, weights_bytes=0), "gpu": RungUse(0, 0, 1 << 34)},
    moves=(Move("team/draw", "remote", "disk", done_bytes=1 << 30, total_bytes=1 << 32, since=1_790_000_000.5),),
    sources=(Origin("s3://models/fleet", 1e9, None), Origin("agent 10.0.0.2:9447", None, "it has closed the connection")),
    copies=(Copy("team/chat", "memory", 1 << 33, "gpu", 1 << 34, 18 << 30, "disk", 0.42, None),),
)
STATE = State(
    at=1_790_000_060.0,
    version="1.0",
    instance="zerowake-scaler-0",
    leads=True,
    missing=None,
    models=(CHAT,),
    nodes=(NODE,),
    replicas=(Replica("r1", "chat", "gpu-1", "restored", ReplicaState.READY, None, in_flight=8, detail=None),),
    plan=Plan(
        under_way=(Step("stage", "draw", "team/draw", "gpu-1", "disk", None, "a request waits for it", for_seconds=None),),
        put_off=(Step("stage", "chat", "team/chat", "gpu-1", "parked", None, "no GPU has room", for_seconds=12.5),),
    ),
    activations=(
        Activation(
            id="0123456789ab",
            model="chat",
            outcome="served",
            reason=None,
            origin="restored",
            began=1_790_000_050.0,
            seconds=0.75,
            phases=(Phase("held", 0.0, 0.01), Phase("image", 0.01, 0.4), Phase("weights", 0.01, 0.5)),
            unaccounted_seconds=0.24,
            trace="0af7651916cd43dd8448eb211c80319c",
        ),
    ),
)


def test_the_json() -> None:
    assert as_json(STATE) == json.loads(GOLDEN.read_text())


def test_it_is_read_again_and_what_a_newer_scaler_says_besides_is_passed_over() -> None:
    assert decoded(encoded(STATE)) == STATE
    assert decoded(json.dumps(as_json(STATE) | {"weather": "fine"}).encode()) == STATE


def test_every_field_is_in_it() -> None:
    told = as_json(STATE)
    assert list(told) == [field.name for field in dataclasses.fields(State)]
    assert list(told["models"][0]) == [field.name for field in dataclasses.fields(Model)]
    assert list(told["nodes"][0]) == [field.name for field in dataclasses.fields(Node)]


def test_absent_is_null_and_not_left_out() -> None:
    activation = as_json(dataclasses.replace(STATE.activations[0], outcome="open", unaccounted_seconds=None))
    assert activation["unaccounted_seconds"] is None
