"""States to be shown: of as many nodes and models as a test wants, always the same ones for the same numbers."""

import random
from dataclasses import replace

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
    State,
    Step,
)

AT = 1_790_000_000.0
# What takes how long, in seconds, of a start that was restored and of one that was cold.
RESTORED = {"held": 0.002, "pushed": 0.004, "staged": 0.01, "image": 0.12, "weights": 0.08, "health": 0.03, "first_byte": 0.02}
COLD = {"held": 0.002, "pushed": 0.004, "created": 0.2, "started": 1.5, "health": 2.1, "first_byte": 0.4}


def start(name: str, model: str, origin: str, began: float, scale: float = 1.0) -> Activation:
    phases, at = [], 0.0
    for phase, seconds in (COLD if origin == "cold" else RESTORED).items():
        beside = phase == "weights"  # they move while the image does, which takes longer
        phases.append(Phase(phase, at - RESTORED["image"] * scale if beside else at, seconds * scale))
        at += 0.0 if beside else seconds * scale
    return Activation(name, model, "served", None, origin, began, at * 1.1, tuple(phases), at * 0.1)


def model(name: str, *, ready: int = 0, held: int = 0, failure: str | None = None) -> Model:
    return Model(
        name=name,
        namespace=None,
        snapshot=f"default/{name}",
        stage="memory",
        rung="memory",
        pinned=None,
        copies=1,
        copies_wanted=1,
        replicas=Replicas(ready, 0, 0, ready, 4),
        held=held,
        held_limit=10_000,
        held_bytes=held * 1000,
        in_flight=2 * ready,
        elsewhere=0,
        rate=1.5 * ready,
        next_likely_seconds=0.0 if ready else 420.0,
        seconds_to_serve=0.25,
        failure=failure,
        refused=None,
        unusable=None,
        sources=(),
    )


def node(name: str, copies: tuple[Copy, ...] = (), moves: tuple[Move, ...] = ()) -> Node:
    rungs = {
        rung: RungUse(sum(copy.rung == rung for copy in copies), sum(copy.image_bytes for copy in copies if copy.rung == rung), 0)
        for rung in ("disk", "memory", "standby", "parked")
    }
    return Node(
        name=name,
        address=f"{name}:9446",
        presence=Presence.HEARD,
        cordoned=False,
        zone="a",
        memory=Memory(512 << 30, 300 << 30, 100 << 30, 200 << 30),
        gpus=tuple(Gpu(f"GPU-{name}-{n}", "NVIDIA H200", 141 << 30, 90 << 30, 40 << 30, 70 << 30, 2 << 30, 29 << 30) for n in range(2)),
        rates=Rates(1e9, 2e9, 9e9, None, 4e10),
        rungs=rungs | {"gpu": RungUse(0, 0, 64 << 30)},
        moves=moves,
        sources=(Origin("s3://models/fleet", 1e9, None),),
        copies=copies,
    )


def copy(snapshot: str, rung: str, size: int, *, weights: int = 0) -> Copy:
    return Copy(snapshot, rung, size, "gpu" if weights else None, weights, weights, None, 0.3, None)


def state(nodes: int = 3, models: int = 6, copies: int = 4) -> State:
    """copies: on each node. A twentieth of the nodes has something on its way; every third model serves, and every fifth is asked for."""
    chance = random.Random(7)
    names = [f"model-{n}" for n in range(models)]
    all_models = [model(name, ready=int(n % 3 == 0), held=3 * (n % 5 == 1)) for n, name in enumerate(names)]
    all_nodes = []
    for n in range(nodes):
        has = chance.sample(names, min(copies, models))
        there = tuple(
            copy(
                f"default/{name}",
                chance.choice(("disk", "memory", "memory", "standby")),
                chance.randrange(1 << 28, 1 << 35),
                weights=(m % 4 == 0) << 34,
            )
            for m, name in enumerate(has)
        )
        moving = (Move(f"default/{has[0]}", "disk", "memory", n << 22, 1 << 34, AT - 3.0),) if n % 20 == 0 else ()
        all_nodes.append(node(f"node-{n}", there, moving))
    return State(
        at=AT,
        version="0.1.0",
        instance="zerowake-scaler-0",
        leads=True,
        missing=None,
        models=tuple(sorted(all_models, key=lambda each: each.name)),
        nodes=tuple(all_nodes),
        replicas=tuple(
            Replica(f"r-{each.name}", each.name, "node-0", "restored", ReplicaState.READY, None, 2, None)
            for each in all_models
            if each.replicas.ready
        ),
        plan=Plan(
            under_way=(Step("stage", names[0], f"default/{names[0]}", "node-0", "memory", None, "3 requests wait for it", None),),
            put_off=(Step("stage", names[-1], f"default/{names[-1]}", "node-1", "parked", None, "no GPU has room for it", 12.5),),
        ),
        activations=tuple(
            start(f"{n:012x}", names[n % min(models, 40)], "cold" if n >= 60 else "restored", AT - n, 1 + chance.random())
            for n in range(100)
        ),
    )


def moved(old: State, seconds: float) -> State:
    """The same a while later: what is on its way has come further, and the free memory of every tenth node is another."""
    nodes = tuple(
        replace(
            each,
            moves=tuple(replace(move, done_bytes=min(move.total_bytes, move.done_bytes + int(seconds * 1e9))) for move in each.moves),
            memory=replace(each.memory, free_bytes=each.memory.free_bytes - (int(seconds * 1e8) if n % 10 == 0 else 0)),
        )
        for n, each in enumerate(old.nodes)
    )
    models = tuple(replace(each, in_flight=each.in_flight + n % 2) for n, each in enumerate(old.models))
    return replace(old, at=old.at + seconds, nodes=nodes, models=models)
