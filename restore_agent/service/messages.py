"""Between the agent's messages (proto/agent.proto) and the node's own values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError
from zerowake_proto import agent_pb2

from restore_agent.drivers.meminfo import available_memory, total_memory
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.errors import AgentError, ErrorKind
from restore_agent.sequences.capture import CaptureRequest
from restore_agent.sequences.inventory import Gpu, Transfer
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin, Replica, State
from restore_agent.sequences.standby import Rung
from restore_agent.snapshots.catalog import Snapshot, Unreadable
from restore_agent.snapshots.manifest import EngineRecord, Manifest, TemplateRecord, check_name
from restore_agent.snapshots.pins import Pin
from restore_agent.transfer.collection import GRACE, Collected, Heap
from restore_agent.transfer.exchange import OtherAgent
from restore_agent.transfer.finding import Found
from restore_agent.transfer.progress import Progress
from zerowake_shared.address import Address

_LEAST_GRACE = 3600.0


class InvalidField(AgentError, ValueError):
    """A field of a request is missing or out of range; the text begins with its name."""

    kind = ErrorKind.INVALID
    reason = "invalid"


_ORIGINS = {
    Origin.RESTORED: agent_pb2.ORIGIN_RESTORED,
    Origin.COLD: agent_pb2.ORIGIN_COLD,
    Origin.CAPTURED: agent_pb2.ORIGIN_CAPTURED,
    Origin.STANDBY: agent_pb2.ORIGIN_STANDBY,
    Origin.PARKED: agent_pb2.ORIGIN_PARKED,
}
_RUNGS = {Rung.STANDBY: agent_pb2.RUNG_STANDBY, Rung.PARKED: agent_pb2.RUNG_PARKED}
_PINS = {Pin.DISK: agent_pb2.RUNG_DISK, Pin.MEMORY: agent_pb2.RUNG_MEMORY}
_STATES = {
    State.READY: agent_pb2.REPLICA_READY,
    State.RETIRING: agent_pb2.REPLICA_RETIRING,
    State.FAILING: agent_pb2.REPLICA_FAILING,
    State.IDLE: agent_pb2.REPLICA_IDLE,
    State.GONE: agent_pb2.REPLICA_GONE,
}


def engine_record(engine: agent_pb2.Engine) -> EngineRecord:
    """Raises InvalidField."""
    try:
        return EngineRecord(
            command=tuple(engine.command),
            env=dict(engine.env),
            directory=engine.directory or "/",
            port=engine.port,
            health_path=engine.health_path or "/health",
            shared=tuple(engine.shared),
            **({"ready_timeout_seconds": engine.ready_timeout_seconds} if engine.ready_timeout_seconds else {}),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidField(f"engine.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def capture_request(request: agent_pb2.SnapshotRequest) -> CaptureRequest:
    """Raises InvalidField, InvalidName."""
    return CaptureRequest(
        namespace=check_name("namespace", request.snapshot.namespace or "default"),
        name=check_name("name", request.snapshot.name),
        model=check_model(request.model or request.snapshot.name),
        engine=engine_record(request.engine),
        canary_path=request.canary.path,
        canary_body=_text("canary.body", request.canary.body),
        adapters=tuple(request.adapters),
        replace=request.replace,
        weights=Path(request.weights) if request.weights else None,
        template=TemplateRecord(hash=request.template_hash) if request.template_hash else None,
    )


def _text(field: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidField(f"{field}: {error}") from None


def demoted_to(rung: agent_pb2.Rung) -> Rung:
    """Raises InvalidField."""
    found = {agent_pb2.RUNG_UNSPECIFIED: Rung.STANDBY, agent_pb2.RUNG_STANDBY: Rung.STANDBY, agent_pb2.RUNG_PARKED: Rung.PARKED}.get(rung)
    if found is None:
        raise InvalidField("rung: a replica can be demoted to RUNG_STANDBY and RUNG_PARKED")
    return found


def pin(rung: agent_pb2.Rung) -> Pin | None:
    """None: not pinned. Raises InvalidField."""
    found = {told: pin for pin, told in _PINS.items()}.get(rung)
    if found is None and rung != agent_pb2.RUNG_ABSENT:
        raise InvalidField("rung: a snapshot can be pinned to RUNG_DISK and RUNG_MEMORY, and with RUNG_ABSENT no more")
    return found


def other_agents(peers: Iterable[agent_pb2.Peer]) -> list[OtherAgent]:
    """Raises InvalidField."""
    found = [OtherAgent(peer.node, peer.address, peer.complete) for peer in peers]
    for number, other in enumerate(found):
        try:
            Address.parse(other.address)
        except ValueError as error:
            raise InvalidField(f"peers[{number}].address: {error}") from None
    return found


def check_model(model: str) -> str:
    if not model:
        raise InvalidField("model: it is empty")
    return model


def by_name(named: agent_pb2.SnapshotRef) -> agent_pb2.SnapshotRef:
    """What the name stands for is asked. Raises InvalidField."""
    if named.digest:
        raise InvalidField("snapshot.digest: a store is asked by name here; leave it empty")
    return agent_pb2.SnapshotRef(namespace=named.namespace or "default", name=named.name)


def found(value: Found) -> agent_pb2.FindResponse:
    manifest = value.manifest
    return agent_pb2.FindResponse(
        snapshot=agent_pb2.SnapshotRef(namespace=manifest.namespace, name=manifest.name, digest=value.digest),
        created=manifest.created,
        total_bytes=manifest.image_bytes + manifest.weights_bytes,
        cold_seconds=manifest.cold_seconds,
        unfit_reason=value.unfit,
        image_bytes=manifest.image_bytes,
        weights_bytes=_weights_bytes(manifest),
        gpu_bytes=_gpu_bytes(manifest),
        template_hash=manifest.template.hash if manifest.template else "",
        contents_hash=manifest.template.contents if manifest.template else "",
    )


def grace(seconds: float) -> float:
    """Raises InvalidField."""
    if seconds and not seconds >= _LEAST_GRACE:
        raise InvalidField(f"grace_seconds: {seconds:g} is less than {_LEAST_GRACE:g}, which an upload of an older agent may take at least")
    return seconds or GRACE


def collected(value: Collected) -> agent_pb2.CollectResponse:
    def heap(each: Heap) -> agent_pb2.Heap:
        youngest = each.youngest if each.objects else 0.0
        return agent_pb2.Heap(objects=each.objects, bytes=each.size, oldest_seconds=each.oldest, youngest_seconds=youngest)

    return agent_pb2.CollectResponse(
        names=value.names,
        needed=heap(value.needed),
        young=heap(value.young),
        manifests=heap(value.manifests),
        chunks=heap(value.chunks),
        unfinished=heap(value.unfinished),
    )


def reference(snapshot: Snapshot) -> agent_pb2.SnapshotRef:
    return agent_pb2.SnapshotRef(namespace=snapshot.manifest.namespace, name=snapshot.manifest.name, digest=snapshot.digest)


def residency(node: Node, snapshot: Snapshot) -> agent_pb2.Residency:
    pinned = node.store.pins.of(snapshot.digest)
    return agent_pb2.Residency(
        snapshot=reference(snapshot),
        rung=_rung(node, snapshot.digest),
        image_bytes=snapshot.manifest.image_bytes,
        restore_overhead_seconds=node.restorer.overhead.get(snapshot.digest, 0.0),
        unusable_reason=node.staging.damaged.get(snapshot.digest) or node.staging.unusable.get(snapshot.digest, ""),
        weights_bytes=_weights_bytes(snapshot.manifest),
        weights_rung=agent_pb2.WeightsRung.Name(node.weights.view.rung(snapshot.manifest.weights, snapshot.manifest.tenant)),
        gpu_bytes=_gpu_bytes(snapshot.manifest),
        parked_bytes=node.rungs.parked_bytes(snapshot),
        cold_seconds=snapshot.manifest.cold_seconds,
        pinned=_PINS[pinned] if pinned else agent_pb2.RUNG_ABSENT,
        managed=snapshot.digest in node.store.managed,
        revision=node.changes.revision(),
    )


def _weights_bytes(manifest: Manifest) -> int:
    """What one GPU gets at most: those of several are filled beside each other, each over a link of its own."""
    sizes: Counter[str] = Counter()
    for record in manifest.weights:
        sizes[record.gpu] += record.size
    return max(sizes.values(), default=0)


def _gpu_bytes(manifest: Manifest) -> list[int]:
    """What a restore takes of each GPU, the most first."""
    return sorted(manifest.gpus_awake.values(), reverse=True)


def _rung(node: Node, digest: str) -> agent_pb2.Rung:
    if standby := node.standbys.get(digest):
        return _RUNGS[standby.rung]
    return agent_pb2.RUNG_MEMORY if node.staging.in_memory(digest) else agent_pb2.RUNG_DISK


def listed(node: Node, found: Snapshot | Unreadable) -> agent_pb2.Residency:
    if isinstance(found, Snapshot):
        return residency(node, found)
    return agent_pb2.Residency(
        snapshot=agent_pb2.SnapshotRef(namespace=found.namespace, name=found.name),
        rung=agent_pb2.RUNG_DISK,
        unusable_reason=str(found.why),
        revision=node.changes.revision(),
    )


def removed(found: Snapshot | Unreadable, revision: int) -> agent_pb2.Residency:
    named = reference(found) if isinstance(found, Snapshot) else agent_pb2.SnapshotRef(namespace=found.namespace, name=found.name)
    return agent_pb2.Residency(snapshot=named, rung=agent_pb2.RUNG_ABSENT, revision=revision)


def replica(value: Replica) -> agent_pb2.Replica:
    return agent_pb2.Replica(
        id=value.id,
        model=value.model,
        snapshot=reference(value.snapshot) if value.snapshot else _namespace(value),
        state=_STATES[value.state],
        origin=_ORIGINS[value.origin],
        endpoint=_endpoint(value),
        detail=value.detail,
        phases=phases(value.phases, value.spans),
        rung=_RUNGS[value.rung] if value.rung else agent_pb2.RUNG_UNSPECIFIED,
    )


def _namespace(value: Replica) -> agent_pb2.SnapshotRef | None:
    return agent_pb2.SnapshotRef(namespace=value.namespace) if value.namespace else None


def _endpoint(value: Replica) -> agent_pb2.Endpoint:
    route = value.engine.place.route
    return agent_pb2.Endpoint(host=route.host, port=value.engine.record.port, netns=route.netns)


def node(value: Node) -> agent_pb2.Node:
    return agent_pb2.Node(
        name=value.name,
        memory_total_bytes=total_memory(),
        memory_free_bytes=available_memory(),
        bandwidths=agent_pb2.Bandwidths(
            disk_to_memory=value.staging.disk_to_memory.rate,
            memory_to_process=value.restorer.memory_to_process.rate,
            disk_to_gpu=value.weights.rates[WeightsRung.DISK],
            memory_to_gpu=value.weights.rates[WeightsRung.MEMORY],
            remote_to_disk=value.travel.remote_to_disk.rate,
        ),
        peer_port=value.travel.exchange.port if value.travel.exchange else 0,
        gpus=[_gpu(gpu) for gpu in value.inventory.gpus],
        staged_bytes=value.staging.held_bytes,
        staged_limit_bytes=value.staging.budget.limit_bytes,
        weights_room_bytes=value.inventory.weights_room,
        sources=[agent_pb2.SourceState(name=each.name, rate=each.bandwidth.rate, fault=each.fault) for each in value.travel.sources],
    )


def _gpu(value: Gpu) -> agent_pb2.Gpu:
    return agent_pb2.Gpu(
        uuid=value.uuid,
        total_bytes=value.total_bytes,
        free_bytes=value.free_bytes,
        model=value.model,
        unused_bytes=value.unused_bytes,
        pool_bytes=value.pool_bytes,
        parked_bytes=value.parked_bytes,
        others_bytes=value.others_bytes,
    )


def transfer(value: Transfer, now: Progress | None) -> agent_pb2.Transfer:
    """`now`: how far it is; None: it has ended."""
    return agent_pb2.Transfer(
        snapshot=agent_pb2.SnapshotRef(namespace=value.namespace, name=value.name, digest=value.digest),
        rung=_rung_of(value),
        weights_rung=agent_pb2.WeightsRung.Name(value.weights) if value.weights else agent_pb2.WEIGHTS_RUNG_UNSPECIFIED,
        progress=progress(now) if now else None,
    )


def _rung_of(value: Transfer) -> agent_pb2.Rung:
    if value.weights:
        return agent_pb2.RUNG_UNSPECIFIED
    return agent_pb2.RUNG_MEMORY if value.to_memory else agent_pb2.RUNG_DISK


def phases(value: Iterable[tuple[str, float]], spans: Mapping[str, tuple[float, float]]) -> list[agent_pb2.Phase]:
    found = []
    for name, seconds in value:
        begins, ends = spans.get(name, (0.0, 0.0))
        found.append(agent_pb2.Phase(name=name, seconds=seconds, begins=begins, ends=ends))
    return found


def progress(value: Progress) -> agent_pb2.TransferProgress:
    return agent_pb2.TransferProgress(done_bytes=value.done, moved_bytes=value.moved, total_bytes=value.total)
