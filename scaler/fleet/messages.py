"""From the agents' messages (proto/agent.proto) to the plan's values. Behind this file nobody speaks of protocol buffers."""

from __future__ import annotations

from dataclasses import dataclass

from zerowake_proto import agent_pb2

from scaler.books.snapshot_name import SnapshotName
from scaler.gateway.upstream import Endpoint
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Gpu, Rates, Replica, Residency, SourceState, Stored, Transfer
from zerowake_shared.address import Address
from zerowake_shared.phases import Phase

_ORIGINS = {
    agent_pb2.ORIGIN_RESTORED: "restored",
    agent_pb2.ORIGIN_COLD: "cold",
    agent_pb2.ORIGIN_CAPTURED: "captured",
    agent_pb2.ORIGIN_STANDBY: "standby",
    agent_pb2.ORIGIN_PARKED: "parked",
}


def name_of(reference: agent_pb2.SnapshotRef) -> SnapshotName:
    return SnapshotName(reference.namespace, reference.name)


def reference(snapshot: SnapshotName, digest: str = "") -> agent_pb2.SnapshotRef:
    return agent_pb2.SnapshotRef(namespace=snapshot.namespace, name=snapshot.name, digest=digest)


def residency(told: agent_pb2.Residency) -> Residency:
    return Residency(
        digest=told.snapshot.digest,
        rung=_rung(told.rung),
        image_bytes=told.image_bytes,
        weights_bytes=told.weights_bytes,
        weights_rung=_weights_rung(told.weights_rung),
        gpu_bytes=tuple(told.gpu_bytes),
        parked_bytes=tuple(told.parked_bytes),
        overhead_seconds=told.restore_overhead_seconds,
        unusable=told.unusable_reason,
        cold_seconds=told.cold_seconds,
        pinned=_rung(told.pinned),
        managed=told.managed,
    )


def _rung(told: agent_pb2.Rung) -> Rung:
    """A higher one, by a newer agent, includes those that are known here."""
    return Rung(min(max(told, Rung.ABSENT), max(Rung)))


def _weights_rung(told: agent_pb2.WeightsRung) -> WeightsRung:
    """The same of weights."""
    return WeightsRung(min(max(told, WeightsRung.ABSENT), max(WeightsRung)))


def transfer(told: agent_pb2.Transfer, at: float) -> Transfer:
    """at: when it was told, wall-clock seconds since 1970."""
    bytes_of, weights = told.progress, _weights_rung(told.weights_rung) if told.weights_rung else None
    of = name_of(told.snapshot), told.snapshot.digest
    return Transfer(*of, _rung(told.rung), bytes_of.done_bytes, bytes_of.total_bytes, since=at, weights_rung=weights)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a store has under a name. template, contents: hashes of what it was captured from, as the capture pod had them; empty: none.

    unfit: why the node that was asked could not restore it; empty: it could.
    """

    stored: Stored
    template: str
    contents: str
    unfit: str = ""


def kept(store: str, told: agent_pb2.FindResponse) -> Kept:
    """By an agent's answer; store: the URL that it was asked about."""
    stored = Stored(store, told.snapshot.digest, told.image_bytes, told.weights_bytes, tuple(told.gpu_bytes))
    return Kept(stored, told.template_hash, told.contents_hash, told.unfit_reason)


def rates(told: agent_pb2.Bandwidths) -> Rates:
    return Rates(told.disk_to_memory, told.memory_to_process, told.disk_to_gpu, told.memory_to_gpu, told.remote_to_disk)


def known(told: agent_pb2.Node | agent_pb2.Gpu, field: str) -> int | None:
    """What an agent says of a number that an older one does not know; None: it says nothing."""
    return getattr(told, field) if told.HasField(field) else None


def gpus(told: agent_pb2.Node) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            gpu.uuid,
            gpu.total_bytes,
            gpu.free_bytes,
            gpu.model,
            unused_bytes=known(gpu, "unused_bytes"),
            pool_bytes=known(gpu, "pool_bytes"),
            parked_bytes=known(gpu, "parked_bytes"),
            others_bytes=known(gpu, "others_bytes"),
        )
        for gpu in told.gpus
    )


def sources(told: agent_pb2.Node) -> tuple[SourceState, ...]:
    return tuple(SourceState(each.name, each.rate, each.fault) for each in told.sources)


def peer_address(told: agent_pb2.Node, agent: str) -> str:
    """Of an agent that is called at `agent`: HOST:PORT; empty where it gives nothing to others, or is a process of this machine alone."""
    if not told.peer_port or agent.startswith("unix:"):
        return ""
    return str(Address.parse(agent)._replace(port=told.peer_port))


def replica(told: agent_pb2.Replica) -> Replica:
    sleeps = max(_rung(told.rung), Rung.STANDBY) if told.state == agent_pb2.REPLICA_IDLE else None
    return Replica(told.id, told.model, told.snapshot.namespace, _ORIGINS.get(told.origin, "unknown"), told.detail, sleeps)


def seconds_beside_weights(told: agent_pb2.Replica) -> float:
    """What making the replica took beside moving its weights."""
    return sum(phase.seconds for phase in told.phases if Phase.whole(phase.name) != Phase.WEIGHTS)


def endpoint(told: agent_pb2.Endpoint) -> Endpoint:
    return Endpoint(told.host, told.port, told.netns)
