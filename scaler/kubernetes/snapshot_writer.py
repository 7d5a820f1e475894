"""What the controller writes of a ModelSnapshot: its status, its finalizers, and events about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from scaler.kubernetes import resources
from scaler.kubernetes.events import Kind
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, Condition, ModelSnapshot, Status, condition, with_condition
from scaler.kubernetes.source_conditions import worth_telling
from zerowake_shared.clock import Clock
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.informer import Key

_NAMED = ("digest", "imageBytes", "weightsBytes", "gpuBytes", "locations", "templateHash", "contentsHash", "model", "asleep")


class SnapshotWriter:
    """Writes, and knows what it wrote until the informer has heard of it. sources: the condition that stands in every status, if any."""

    def __init__(self, cluster: Cluster, clock: Clock, sources: Callable[[ModelSnapshot], Condition | None]) -> None:
        self._cluster = cluster
        self._clock = clock
        self._sources = sources
        self._written: dict[Key, ModelSnapshot] = {}

    def latest(self, known: ModelSnapshot | None) -> ModelSnapshot | None:
        """The object as the informer has it, or as we wrote it where the informer has not heard of that yet."""
        written = self._written.get(known.key) if known else None
        if known is None or written is None or known.metadata.uid != written.metadata.uid:
            return known
        older = int(known.metadata.resource_version) < int(written.metadata.resource_version)
        return written if older else known

    def forget(self, key: Key) -> None:
        self._written.pop(key, None)

    def forget_all(self) -> None:
        self._written.clear()

    async def finalizers(self, snapshot: ModelSnapshot, finalizers: Iterable[str]) -> ModelSnapshot:
        """Raises: NotFound, Conflict: it has changed meanwhile, ClusterError."""
        version = {"resourceVersion": snapshot.metadata.resource_version, "finalizers": list(finalizers)}
        return self._note(await self._cluster.patch(MODEL_SNAPSHOTS, *snapshot.key, {"metadata": version}))

    async def status(self, snapshot: ModelSnapshot, status: Status, *conditions: Condition) -> ModelSnapshot:
        """Writes the status with these conditions in it, if that changes anything. Raises: NotFound, ClusterError."""
        wall = self._clock.wall()
        before, now = snapshot.status.condition(resources.CONDITION_SOURCES), self._sources(snapshot)
        kept = tuple(each for each in status.conditions if each.type != resources.CONDITION_SOURCES)
        status = msgspec.structs.replace(status, conditions=(*kept, *([before] if before and now else [])))
        for each in (*conditions, *([now] if now else [])):
            status = msgspec.structs.replace(status, conditions=with_condition(status.conditions, each, wall))
        status = msgspec.structs.replace(status, observed_generation=snapshot.metadata.generation, model=snapshot.model)
        if status == snapshot.status:
            return snapshot
        body = {"status": msgspec.to_builtins(status)}
        for name in _NAMED:
            body["status"].setdefault(name, None)  # a merge patch leaves alone what it does not name
        written = self._note(await self._cluster.patch(MODEL_SNAPSHOTS, *snapshot.key, body, subresource="status"))
        if now and now.status == "False" and worth_telling(before, now):
            await self.event(snapshot, "Warning", f"Source{now.reason}", now.message, "Ask")
        return written

    async def not_captured(self, snapshot: ModelSnapshot, phase: str, reason: str, message: str) -> None:
        """There is no snapshot of this template. One of an older template stays on its nodes until it is replaced, but is not used.

        Raises: NotFound, ClusterError.
        """
        kinds = (resources.CONDITION_CAPTURED, resources.CONDITION_READY)
        conditions = [condition(snapshot, kind, False, "", reason, message) for kind in kinds]
        same = snapshot.status.template_hash == snapshot.template_hash
        old = msgspec.structs.replace(snapshot.status, digest="", locations=(), image_bytes=0) if same else snapshot.status
        of_another = (resources.CONDITION_STORED, resources.CONDITION_COPIED)
        old = msgspec.structs.replace(old, conditions=tuple(each for each in old.conditions if each.type not in of_another))
        await self.status(snapshot, msgspec.structs.replace(old, phase=phase), *conditions)

    async def event(self, snapshot: ModelSnapshot, kind: Kind, reason: str, note: str, action: str = "Capture") -> None:
        """Best effort."""
        await self._cluster.event(MODEL_SNAPSHOTS, snapshot.metadata, kind, reason, note, action)

    def _note(self, answer: bytes) -> ModelSnapshot:
        written = msgspec.json.decode(answer, type=ModelSnapshot)
        self._written[written.key] = written
        return written
