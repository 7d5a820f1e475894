"""What a plan asks for: frozen values, each with the reason that a person is told. One executor carries them out (fleet/executor.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.rungs import Rung


@dataclass(frozen=True, slots=True)
class Stage:
    """A snapshot goes up to the rung on the node whose agent has this address. store: where it can be fetched from, beside other agents, if
    the node does not have it; empty: nowhere. urgent: a request waits for it.
    """

    node: str
    model: str
    snapshot: SnapshotName
    digest: str
    rung: Rung
    reason: str = field(compare=False)
    store: str = field(default="", compare=False)
    urgent: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Drop:
    """A snapshot does not go above the rung on that node: what is on its way there is given up. weights: its weights leave memory, too."""

    node: str
    model: str
    snapshot: SnapshotName
    digest: str
    rung: Rung
    reason: str = field(compare=False)
    weights: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Pin:
    """No budget of that node takes the snapshot from the rung, or from those below it. ABSENT: it is not pinned any more."""

    node: str
    model: str = field(compare=False)  # one of those that have it
    snapshot: SnapshotName
    digest: str
    rung: Rung
    reason: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Start:
    """A replica of the model is made.

    node: by the agent of that address; empty: Kubernetes chooses, and what is scaled is set to `replicas`. number: tells starts of one
    model apart while they are under way.
    """

    model: str
    node: str
    reason: str = field(compare=False)
    replicas: int = 1
    number: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """A replica ends when it has finished what it has, or a start is given up.

    replica: its id; empty: the start `number` of the model. parked_seconds: it is kept parked for so long (0: until it is used or its
    room is wanted; None: it is not parked); standby_seconds: then as a standby for so long (0: until it is used; None: it is not).
    """

    model: str
    node: str
    replica: str
    reason: str = field(compare=False)
    parked_seconds: float | None = None
    standby_seconds: float | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class Keep:
    """A replica that is ending, and has requests still, is wanted after all: it takes new ones again."""

    model: str
    node: str
    replica: str
    reason: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Sleep:
    """A replica that nobody asks stays in its pod, and sleeps there on the rung."""

    node: str
    model: str
    replica: str
    rung: Rung
    reason: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Prefer:
    """Where a pod of the model should run. seconds: the estimate, by node's name; a node that is not named cannot serve it.

    avoid: names of nodes at which nothing answers.
    """

    model: str
    seconds: Mapping[str, float]
    reason: str = field(compare=False)
    avoid: tuple[str, ...] = ()


Action = Stage | Drop | Pin | Start | End | Keep | Sleep | Prefer
