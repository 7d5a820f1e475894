"""The state of the whole system at one moment, as one scaler knows it: frozen values, of which everything that is shown is a view.

They are the same for one machine and for Kubernetes. The JSON has the fields' names: seconds and bytes are in them, moments (`at`, `began`,
`since`) are seconds since 1970, what is not known or does not apply is null. Rungs are named as in plan/rungs.py, in lower case.

Rejected: a list of all copies beside that of the nodes, which would name each node once per copy, and be made anew for one that changed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

SCALER_SOCKET = "\0zerowake-scaler"  # where the scaler of a pod answers
LAST = "last"  # in the place of an activation's id


def socket_of(state: Path) -> Path:
    """Where the scaler of a machine with this state folder answers."""
    return state / "status.sock"


class Presence(enum.StrEnum):
    """What is heard of a node's agent. UNHEARD: its stream is broken, or not whole so far; SILENT: nothing came of it any more."""

    HEARD = "heard"
    UNHEARD = "unheard"
    SILENT = "silent"


class ReplicaState(enum.StrEnum):
    """READY: it takes requests. SLEEPING: in its pod, to be woken first. DRAINING: it only finishes what it has. SUSPECT: it failed a
    request, and gets none until it accepts a connection. UNREACHABLE: nothing answers there. UNSERVED: this gateway sends it nothing."""

    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    SUSPECT = "suspect"
    UNREACHABLE = "unreachable"
    UNSERVED = "unserved"


@dataclass(frozen=True, slots=True)
class Source:
    """What is asked of a model past the gateway, by one source. name: unique among its model's; of: what it is read from; pending:
    requests, and replicas: those that are to be there whatever is pending, both null while it is unknown; age_seconds: of its last value;
    up: that value counts, and nothing failed since; fault: why the last reading failed."""

    name: str
    of: str
    pending: int | None
    replicas: int | None
    age_seconds: float | None
    up: bool
    fault: str | None


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many a model has. ready: they take requests; draining, sleeping: as in ReplicaState; wanted: so many shall be there, null where
    somebody else (KEDA) decides; limit: at most, null: not known."""

    ready: int
    draining: int
    sleeping: int
    wanted: int | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Model:
    """One model, with the demand of all gateways.

    namespace: whose pods may serve it, null on one machine; snapshot: NAMESPACE/NAME, null: it is started, not restored; stage: the rung on
    which it is to wait; rung: the highest on which it stands anywhere, null: nowhere; pinned: its owner's pin; copies, copies_wanted: nodes
    that have it, and that shall.

    seconds_to_serve: the estimate of the node that would serve it soonest; null: none could by its snapshot.
    held: requests that wait, of at most held_limit at each gateway; held_bytes: of their bodies, at this gateway; elsewhere: requests past
    all gateways. rate: requests a second that this gateway gave to replicas over the last minute. next_likely_seconds: when a request has
    come by the forecast as likely as not; 0: it is asked for; null: not within six hours, or not known.

    failure: why the last start of a replica failed; refused: why its snapshot stands no higher, or is not fetched, by the agents' own
    words; unusable: why it cannot be restored.
    """

    name: str
    namespace: str | None
    snapshot: str | None
    stage: str
    rung: str | None
    pinned: str | None
    copies: int
    copies_wanted: int
    replicas: Replicas
    held: int
    held_limit: int
    held_bytes: int
    in_flight: int
    elsewhere: int
    rate: float
    next_likely_seconds: float | None
    seconds_to_serve: float | None
    failure: str | None
    refused: str | None
    unusable: str | None
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. model: as its driver calls it. free_bytes: now, with what gpumem would give up of its pool, and parked engines of theirs.
    Who has what of it: nobody (unused_bytes), gpumem, lent or not (pool_bytes), parked engines, and all else (others_bytes)."""

    uuid: str
    model: str | None
    total_bytes: int
    free_bytes: int
    unused_bytes: int | None
    pool_bytes: int | None
    parked_bytes: int | None
    others_bytes: int | None


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured on a node, bytes a second; null: not measured yet."""

    remote_to_disk: float | None
    disk_to_memory: float | None
    memory_to_process: float | None
    disk_to_gpu: float | None
    memory_to_gpu: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """A node's host memory. staged_bytes: what images take that stand in it or are on their way; staged_limit_bytes: their budget."""

    total_bytes: int
    free_bytes: int
    staged_bytes: int | None
    staged_limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Origin:
    """A store, or another agent, as a node has found it. rate: bytes a second, null: nothing has come yet; fault: why it gave nothing."""

    name: str
    rate: float | None
    fault: str | None


@dataclass(frozen=True, slots=True)
class Move:
    """A snapshot on its way up. above: the rung that it comes from (`remote`: from a store or another node), to: where it goes (`arena`,
    `gpu`: its weights alone, into gpumem's arena or into memory that it lends); done_bytes of total_bytes are there (0: not known); since:
    when it was heard of first."""

    snapshot: str
    above: str
    to: str
    done_bytes: int
    total_bytes: int
    since: float


@dataclass(frozen=True, slots=True)
class Copy:
    """A snapshot on a node. rung: its image's; weights_rung: the lowest of its weights', null: it has none outside the image. gpu_bytes: of
    all GPUs that a restore uses. seconds_to_serve: the estimate there; null: it cannot. unusable: why it cannot be restored there."""

    snapshot: str
    rung: str
    image_bytes: int
    weights_rung: str | None
    weights_bytes: int
    gpu_bytes: int
    pinned: str | None
    seconds_to_serve: float | None
    unusable: str | None


@dataclass(frozen=True, slots=True)
class RungUse:
    """What stands on one rung of a node and no higher: images, and weights by a rung of their own."""

    images: int
    image_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Node:
    """One node, as its agent describes it. name: its address until the agent has said it. rungs: by rung, from `disk` to `parked`, and
    `gpu` for weights that are mapped there or can be; cordoned, zone: by its cluster; sources: what it has read from of late."""

    name: str
    address: str
    presence: Presence
    cordoned: bool
    zone: str | None
    memory: Memory
    gpus: tuple[Gpu, ...]
    rates: Rates
    rungs: dict[str, RungUse]
    moves: tuple[Move, ...]
    sources: tuple[Origin, ...]
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine. origin: how it was made (restored, standby, parked, cold, captured); null: no agent has said it. sleeps: the rung on
    which it sleeps. in_flight: requests of this gateway. detail: why it was started cold."""

    id: str
    model: str
    node: str | None
    origin: str | None
    state: ReplicaState
    sleeps: str | None
    in_flight: int
    detail: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """One action of the plan. do: stage, drop, pin, start, end, keep or sleep. node: where, null: Kubernetes chooses. replica: of end, keep
    and sleep. for_seconds: so long it is put off; null: it is under way."""

    do: str
    model: str | None
    snapshot: str | None
    node: str | None
    rung: str | None
    replica: str | None
    why: str
    for_seconds: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is being done, and what an agent refused and is asked again later. What would be done next and why: `zerowake plan`."""

    under_way: tuple[Step, ...]
    put_off: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of an activation. begins_seconds: after its beginning, by the clock of the scaler. Phases may overlap: seconds are its own."""

    name: str
    begins_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Activation:
    """A scale-up from zero, first byte in to first byte out. outcome: open, served or abandoned, for the reason given. origin: how its
    replica was made. seconds: so far, or in all; unaccounted_seconds: what no phase accounts for, null while it is open. trace: the id of
    its trace, null where none are exported."""

    id: str
    model: str
    outcome: str
    reason: str | None
    origin: str | None
    began: float
    seconds: float
    phases: tuple[Phase, ...]
    unaccounted_seconds: float | None
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """All of it. instance: the scaler that tells it (its pod, or its machine); leads: what is one thing in the cluster is done by this one;
    missing: what it has not heard yet, so that this is not whole. Models, nodes and replicas are in the order of their names; activations
    the latest first, open ones before those that have ended."""

    at: float
    version: str
    instance: str
    leads: bool
    missing: str | None
    models: tuple[Model, ...]
    nodes: tuple[Node, ...]
    replicas: tuple[Replica, ...]
    plan: Plan
    activations: tuple[Activation, ...]


def as_json(value: object) -> Any:
    """A value of this file in JSON's types: objects, lists, text, numbers, null."""
    return msgspec.json.decode(encoded(value))


def encoded(value: object) -> bytes:
    """A value of this file as JSON text, in UTF-8."""
    return msgspec.json.encode(value)


def decoded(text: bytes) -> State:
    """What `encoded` has made of a state, maybe by a newer scaler: what it says besides is passed over. Raises: msgspec.DecodeError."""
    return msgspec.json.decode(text, type=State)


def as_activation(value: object) -> Activation:
    """What `as_json` has made of one, as in `decoded`. Raises: msgspec.ValidationError."""
    return msgspec.convert(value, type=Activation)
