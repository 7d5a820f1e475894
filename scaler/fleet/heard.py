"""What one node's agent has said of its node.

It is kept as it comes and shown as one frozen value (`node`), which is made when somebody looks and kept until something new is heard. Who
asks the agent to do something, agent.py says.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import replace
from types import MappingProxyType

from zerowake_proto import agent_pb2

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import messages
from scaler.gateway.upstream import Endpoint
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Node, Replica, Residency, Transfer

_REMEMBERED = 1000  # ids of replicas that have ended: later news of them is old
_NEW_SHARE = 0.3  # of what was measured last in what is smoothed


class Heard:
    """Of one agent; `synced` is set while its stream is whole."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.synced = asyncio.Event()
        self.silent = False  # nothing came any more
        self._words = 0  # that its stream has said
        self.patience: asyncio.Timeout | None = None  # in which the stream's next word has to come
        self.residencies: dict[SnapshotName, Residency] = {}
        self.replicas: dict[str, Replica] = {}
        self._transfers: dict[tuple[SnapshotName, Rung, WeightsRung | None], Transfer] = {}
        self.endpoints: dict[str, Endpoint] = {}  # of its replicas
        self.gone: deque[str] = deque(maxlen=_REMEMBERED)
        self._restoring: Counter[str] = Counter()  # restores that are not answered yet, by model
        self._early: dict[str, tuple[Replica, Endpoint]] = {}  # replicas that the stream has named while one was
        self._revisions: dict[SnapshotName, int] = {}  # of what was said last of each, in this stream or since
        self._parked_overheads: dict[str, float] = {}  # by digest: seconds of waking a parked one beside its weights, smoothed
        self._fetch_rate = 0.0  # bytes a second of snapshots that came to it, smoothed: where its agent is an older one, which does not say
        self._told = Node(address)
        self._shown: Node | None = None

    @property
    def name(self) -> str:
        """The node's name; empty until the agent has said it."""
        return self._told.name

    @property
    def node(self) -> Node:
        """All that is known of the node, as it is now."""
        shown, synced = self._shown, self.synced.is_set()
        if shown is None or (shown.synced, shown.silent) != (synced, self.silent):
            shown = self._shown = replace(
                self._told,
                synced=synced,
                silent=self.silent,
                rates=replace(self._told.rates, remote_to_disk=self._told.rates.remote_to_disk or self._fetch_rate),
                residencies=MappingProxyType(dict(self.residencies)),
                replicas=MappingProxyType(dict(self.replicas)),
                transfers=tuple(self._transfers.values()),
            )
        return shown

    def begins(self) -> None:
        """A stream of it begins, maybe another program's, which counts what it says anew."""
        self._revisions.clear()
        self._transfers.clear()
        self._shown = None

    def speaks(self) -> None:
        """Its stream has said something."""
        self.silent = False
        self._words += 1

    def describe(self, told: agent_pb2.Node) -> bool:
        """Takes what the agent says of the node itself. Returns whether its GPUs are otherwise than it said before."""
        before = self._told.gpus
        self._told = Node(
            self.address,
            name=told.name,
            memory_total_bytes=told.memory_total_bytes,
            memory_free_bytes=told.memory_free_bytes,
            gpus=messages.gpus(told),
            rates=messages.rates(told.bandwidths),
            peer_address=messages.peer_address(told, self.address),
            sources=messages.sources(told),
            staged_bytes=messages.known(told, "staged_bytes"),
            staged_limit_bytes=messages.known(told, "staged_limit_bytes"),
            weights_room_bytes=messages.known(told, "weights_room_bytes"),
        )
        self._shown = None
        return self._told.gpus != before

    def settle(self, snapshot: SnapshotName, residency: Residency | None, revision: int = 0) -> None:
        """Where a snapshot stands now; None: not on this node any more. revision: of who said so: the stream and an answer overtake each
        other, and what was said before counts no more; 0: nothing was said later.
        """
        if revision and revision < self._revisions.get(snapshot, 0):
            return
        self._revisions[snapshot] = revision
        if residency is None:
            self.residencies.pop(snapshot, None)
        else:
            overhead = self._parked_overheads.get(residency.digest, 0.0)
            self.residencies[snapshot] = replace(residency, parked_overhead_seconds=overhead)
        self._shown = None

    def carry(self, transfer: Transfer, *, ended: bool) -> None:
        """Takes how far a snapshot is that comes up, or that it does not come any more."""
        way = transfer.snapshot, transfer.rung, transfer.weights_rung
        if ended:
            self._transfers.pop(way, None)
        else:
            before = self._transfers.get(way, transfer)
            self._transfers[way] = replace(transfer, since=before.since)
        self._shown = None

    def note_wake(self, told: agent_pb2.Replica) -> None:
        """Of a replica that is new: takes from its phases how long waking a parked one takes here. What a restore takes, the agent says."""
        if told.origin != agent_pb2.ORIGIN_PARKED or not told.snapshot.digest:
            return
        seconds = messages.seconds_beside_weights(told)
        before = self._parked_overheads.get(told.snapshot.digest, seconds)
        self._parked_overheads[told.snapshot.digest] = before + _NEW_SHARE * (seconds - before)

    def note_fetch(self, size: int, seconds: float) -> None:
        """So many bytes of a snapshot have come from other nodes in that time."""
        if size and seconds > 0:
            before = self._fetch_rate or size / seconds
            self._fetch_rate = before + _NEW_SHARE * (size / seconds - before)
            self._shown = None

    def add(self, replica: Replica, endpoint: Endpoint) -> None:
        self._early.pop(replica.id, None)
        self.replicas[replica.id] = replica
        self.endpoints[replica.id] = endpoint
        self._shown = None

    def hear(self, replica: Replica, endpoint: Endpoint) -> None:
        """Takes a ready replica that the stream names. It may be what a restore under way has made, and the stream sooner than the answer:
        among the node's replicas it would be counted twice then, so it waits for the answers.
        """
        if self._restoring[replica.model] and replica.id not in self.replicas:
            self._early[replica.id] = replica, endpoint
        else:
            self.add(replica, endpoint)

    def knows(self, replica_id: str) -> bool:
        """Whether the replica was named already."""
        return replica_id in self.replicas or replica_id in self._early

    def forget(self, replica_id: str) -> None:
        """The replica has ended."""
        self.gone.append(replica_id)
        self.drop(replica_id)

    def drop(self, replica_id: str) -> None:
        """The agent says nothing of the replica any more, and may name it again."""
        self._early.pop(replica_id, None)
        self.replicas.pop(replica_id, None)
        self.endpoints.pop(replica_id, None)
        self._shown = None

    def _settle_early(self, model: str) -> None:
        """No restore is under way any more: what the stream has named are replicas, whoever asked for them."""
        for replica, endpoint in [each for each in self._early.values() if each[0].model == model]:
            self.add(replica, endpoint)
