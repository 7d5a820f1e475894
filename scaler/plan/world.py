"""What a plan is made from: frozen values, and nothing that knows where they come from.

A world is built anew for each decision, from the ledger and from what agents say (fleet/planner.py), or by hand in a test. Protocol
buffers end where nodes are heard (fleet/nodes.py), so that the plan can be tested, replayed and simulated without a socket. Rejected: one
world that is kept and changed in place, which a decision could see half-changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from scaler.books.demand import Demand
from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import Action
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.scheduling import PodDemands, Standing, why_no_pod
from scaler.plan.under_way import UnderWay


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured on the node, in bytes a second; 0: not measured yet. remote_to_disk: of snapshots that came to it."""

    disk_to_memory: float = 0.0
    memory_to_process: float = 0.0
    disk_to_gpu: float = 0.0
    memory_to_gpu: float = 0.0
    remote_to_disk: float = 0.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a node. free_bytes: free now, with what gpumem would give up of its pool, and parked engines of theirs.

    model: as its driver calls it; empty: not known. Who has what of it, None where that is not known: nobody (unused_bytes), gpumem, lent
    or not (pool_bytes), parked engines (parked_bytes), engines that run and programs of others (others_bytes).
    """

    uuid: str
    total_bytes: int
    free_bytes: int
    model: str = ""
    unused_bytes: int | None = None
    pool_bytes: int | None = None
    parked_bytes: int | None = None
    others_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SourceState:
    """A store or another agent, as a node has found it. name: a store's URL, or `agent HOST:PORT`. rate: bytes a second while it was read
    from; 0: not measured. fault: why it gave nothing when it was asked last; empty: it gave."""

    name: str
    rate: float
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Residency:
    """One snapshot on one node.

    weights_rung: the lowest of its regions' rungs. gpu_bytes: what a restore takes of each GPU that it uses; empty: it uses none.
    parked_bytes: what it holds of each GPU while it is parked; empty: not known, or none. overhead_seconds: what a restore took there
    beside moving image and weights, smoothed; 0: none was made. parked_overhead_seconds: the same of waking a parked one. unusable: why it
    cannot be restored there; empty: it can. sources: addresses of the agents that the node can fetch it from, where it is absent: then it
    is remote, the rung below disk (plan/remote.py). store: the URL of a store that it can be fetched from besides; empty: none.
    cold_seconds: what its engine took to be ready when it was taken; 0: not known. pinned: no budget there takes it from this rung, or
    from those below; ABSENT: any may. managed: a cluster's controller had it brought there, and no person has since.
    """

    digest: str
    rung: Rung
    image_bytes: int
    weights_bytes: int = 0
    weights_rung: WeightsRung = WeightsRung.ABSENT
    gpu_bytes: tuple[int, ...] = ()
    overhead_seconds: float = 0.0
    unusable: str = ""
    parked_bytes: tuple[int, ...] = ()
    parked_overhead_seconds: float = 0.0
    sources: tuple[str, ...] = ()
    store: str = ""
    cold_seconds: float = 0.0
    pinned: Rung = Rung.ABSENT
    managed: bool = False

    @property
    def lacks_weights(self) -> bool:
        """It has some, and not all of them are in memory."""
        return bool(self.weights_bytes) and self.weights_rung <= WeightsRung.DISK


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far a snapshot is on its way up to a rung of a node, bytes: all of it to disk, its image to memory. weights_rung: its weights are
    on their way to that one, and `rung` is ABSENT. digest: empty: not known. since: when it was heard of first, wall-clock seconds
    since 1970."""

    snapshot: SnapshotName
    digest: str
    rung: Rung
    done_bytes: int
    total_bytes: int
    since: float = field(default=0.0, compare=False)
    weights_rung: WeightsRung | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A snapshot that a store keeps, as its manifest there says. url: the store's. weights_bytes, gpu_bytes: as a Residency's."""

    url: str
    digest: str
    image_bytes: int
    weights_bytes: int = 0
    gpu_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine that serves. namespace: its pod's, or its snapshot's; origin: "restored", "standby", "parked", "cold" or "captured".

    sleeps: the rung on which it sleeps in its pod; None: it is awake, for all that is known since the moment `since`.
    """

    id: str
    model: str
    namespace: str = ""
    origin: str = ""
    detail: str = ""
    sleeps: Rung | None = None
    since: float = field(default=-math.inf, compare=False)


@dataclass(frozen=True, slots=True)
class Node:
    """One node as its agent describes it. address: the agent's, which no other has; synced: its stream is whole; silent: its stream ended
    because nothing came any more, and nothing has come since. peer_address: where it gives snapshots to other nodes; empty: nowhere.
    standing: what its cluster says of it; None: nothing.
    """

    address: str
    name: str = ""
    synced: bool = False
    memory_total_bytes: int = 0
    memory_free_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    rates: Rates = Rates()
    residencies: Mapping[SnapshotName, Residency] = field(default_factory=dict)
    replicas: Mapping[str, Replica] = field(default_factory=dict)  # by id, the oldest first
    sources: tuple[SourceState, ...] = ()  # that it has read from of late; none by an older agent
    staged_bytes: int | None = None  # of its memory, what images take; None: not known
    staged_limit_bytes: int | None = None  # what they may take at most; None: not known
    weights_room_bytes: int | None = None  # the largest weights that could come up with none leaving; None: not known, or no gpumem
    transfers: tuple[Transfer, ...] = ()  # as they began; none by an older agent
    silent: bool = False
    peer_address: str = ""
    standing: Standing | None = None

    @property
    def called(self) -> str:
        """As people call it: by its address until its agent has said its name."""
        return self.name or self.address

    @property
    def zone(self) -> str:
        """The one that its cluster says it is in; empty: none."""
        return self.standing.zone if self.standing else ""


@dataclass(frozen=True, slots=True)
class Model:
    """What its owner wishes of one model.

    snapshot: None: it is started, not restored. stage: the rung on which its snapshot waits. parked_seconds: how long a replica that is
    not needed any more is kept parked, and standby_seconds: how long as a standby, then (0: until it is used; None: not at all).
    longest_staging: seconds; no node is chosen to stage on that would take longer. replicas: how many are wanted here; None: somebody else
    makes them. digest: the one snapshot of that name that may be fetched to another node, empty: none may; None: whichever a node has.
    not_before: no start before that moment, since the last one failed. idle: the rung on which replicas in pods sleep that
    nobody has asked for `idle_seconds`; None: they stay awake. stored: what a store keeps of it; None: nothing, as far as is known. copies:
    so many nodes keep its snapshot (plan/copies.py). pods: what its pods ask of a node; None: not known, or it has none. pin: as a
    Residency's `pinned`, wherever it is.
    """

    name: str
    snapshot: SnapshotName | None = None
    stage: Rung = Rung.MEMORY
    parked_seconds: float | None = None
    standby_seconds: float | None = None
    longest_staging: float = math.inf
    replicas: int | None = None
    not_before: float = -math.inf
    idle: Rung | None = None
    idle_seconds: float = 300.0
    digest: str | None = None
    stored: Stored | None = None
    copies: int = 1
    pods: PodDemands | None = None
    pin: Rung = Rung.ABSENT

    def why_not_on(self, node: Node) -> str:
        """Why no pod of it is put on the node; empty: nothing is known that speaks against it."""
        return why_no_pod(node.name, node.standing, self.pods)


@dataclass(frozen=True, slots=True)
class ScaleTarget:
    """What a ScaledObject scales, as it was read: replicas now, requests that one is meant for, and the bound on replicas."""

    replicas: int
    target_pending: float
    max_replicas: int


class NodeSet(tuple[Node, ...]):
    """Nodes, in their order, and who of them has what. What is asked of many snapshots is looked up once."""

    _having: dict[SnapshotName, list[tuple[Node, Residency]]]
    _running: dict[str, list[tuple[Node, Replica]]] | None
    _whole: bool

    def __new__(cls, nodes: Iterable[Node]) -> NodeSet:
        made = super().__new__(cls, nodes)
        made._having, made._running, made._whole = {}, None, False
        return made

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> NodeSet:
        """These nodes; the same object where it is one."""
        return nodes if isinstance(nodes, cls) else cls(nodes)

    def having(self, snapshot: SnapshotName | None) -> list[tuple[Node, Residency]]:
        """The nodes with a snapshot of that name, heard or not, and how it stands there."""
        if snapshot is None:
            return []
        if not self._whole and snapshot not in self._having:
            if len(self._having) < _LOOKED_UP:
                self._having[snapshot] = [(node, there) for node in self if (there := node.residencies.get(snapshot)) is not None]
            else:
                self._look_at_all()
        return self._having.get(snapshot, [])

    def running(self, model: str) -> list[tuple[Node, Replica]]:
        """The model's replicas, node by node, on each the oldest first."""
        if self._running is None:
            self._running = {}
            for node in self:
                for replica in node.replicas.values():
                    self._running.setdefault(replica.model, []).append((node, replica))
        return self._running.get(model, [])

    def _look_at_all(self) -> None:
        self._whole, self._having = True, {}
        for node in self:
            for snapshot, there in node.residencies.items():
                self._having.setdefault(snapshot, []).append((node, there))


_LOOKED_UP = 32  # snapshots that are looked for node by node, before all that nodes have is gone through


@dataclass(frozen=True, slots=True)
class World:
    """All that a plan is made from, at one moment.

    now: seconds of the one clock. demand: of all gateways. in_flight: requests by replica. under_way: actions that are being carried out.
    put_off: (node's address, digest, rung) that an agent refused, or took it down from, until when it is not asked again; pins_put_off: the
    same of pins. targets: what is scaled by Kubernetes, by model. quiet_since: the moment since which a model has no demand. cramped_since:
    the moment since which no node that has a model's snapshot could restore it, by model (plan/remote.py). short_since: the same for fewer
    copies of its snapshot than its owner wants (plan/copies.py). asked_at: when a snapshot was asked for last; infinite: it is now.
    arriving: names of nodes on which a pod is that waits for its engine, by model. quotas: bytes of all nodes' memory that a namespace's
    snapshots may take ahead of requests, by namespace (plan/quotas.py).
    """

    now: float
    models: Mapping[str, Model]
    nodes: tuple[Node, ...] = ()
    demand: Mapping[str, Demand] = field(default_factory=dict)
    in_flight: Mapping[str, int] = field(default_factory=dict)
    under_way: tuple[Action, ...] = ()
    put_off: Mapping[tuple[str, str, Rung], float] = field(default_factory=dict)
    pins_put_off: Mapping[tuple[str, str, Rung], float] = field(default_factory=dict)
    targets: Mapping[str, ScaleTarget] = field(default_factory=dict)
    quiet_since: Mapping[str, float] = field(default_factory=dict)
    cramped_since: Mapping[str, float] = field(default_factory=dict)
    short_since: Mapping[str, float] = field(default_factory=dict)
    asked_at: Mapping[SnapshotName, float] = field(default_factory=dict)
    arriving: Mapping[str, Collection[str]] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", NodeSet.of(self.nodes))
        object.__setattr__(self, "under_way", UnderWay.of(self.under_way))

    @property
    def node_set(self) -> NodeSet:
        """`nodes`, to be asked who has what."""
        return NodeSet.of(self.nodes)

    @property
    def being_done(self) -> UnderWay:
        """`under_way`, to be asked for what."""
        return UnderWay.of(self.under_way)

    def demand_of(self, model: str) -> Demand:
        return self.demand.get(model, _NO_DEMAND)


_NO_DEMAND = Demand(0, 0, 0)
