"""What a ModelSnapshot's status says of where its artifact is, and whether that makes it Ready."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from scaler.kubernetes import environment, resources
from scaler.kubernetes.artifact import ABSENT_AGENT_SECONDS, UNKNOWN, Absences, Artifact
from scaler.kubernetes.cold_starts import ColdStarts
from scaler.kubernetes.declarations import in_memory_all_the_same, planned
from scaler.kubernetes.resources import Condition, Location, ModelSnapshot, Pod, Status, condition
from scaler.kubernetes.snapshot_writer import SnapshotWriter
from scaler.kubernetes.storing import STORED, Storing
from scaler.kubernetes.taken_names import REASON, TakenNames
from scaler.plan.copies import counting, lacking
from scaler.plan.rungs import Rung
from zerowake_shared.clock import Clock

_RESIDENT = "Resident"
_NODES_TOLD = 5  # of those that lack it
_PHASES = {_RESIDENT: resources.READY, resources.CAPTURE_ENDS: resources.CAPTURING}


class Residence:
    """Writes it, and has what lacks in a store put there."""

    def __init__(self, writer: SnapshotWriter, names: TakenNames, cold_starts: ColdStarts, storing: Storing, clock: Clock) -> None:
        self._writer = writer
        self._names = names
        self._cold_starts = cold_starts
        self._storing = storing
        self._absences = Absences(clock)

    async def write(
        self,
        snapshot: ModelSnapshot,
        artifact: Artifact,
        digest: str,
        captured: Condition,
        holders: tuple[Location, ...],
        missing: str,
        capturing: Pod | None = None,
    ) -> float | None:
        """`missing`: what is said where nobody has it. `capturing`: the pod that it was captured in, where that is there still.

        Returns the seconds after which to look again. A holder that can't be asked counts: it had it. Raises: ClusterError.
        """
        holders = self._absences.aged(holders, artifact)
        unusable = {name: each.unusable for name, each in artifact.held.items() if each.unusable}
        usable = [each.name for each in holders if each.name not in unusable]
        stored = self._storing.state(snapshot, artifact, digest, [name for name in usable if name in artifact.held])
        copied = _copied(snapshot, artifact, digest)
        if why := self._names.why(snapshot):
            ready, usable = condition(snapshot, resources.CONDITION_READY, False, "", REASON, why), []
        elif usable and capturing and not capturing.has_ended:
            # Its requests count until it has ended: a pod that is made now may find no room there, and go where it can only start cold.
            why = f"captured; pod {capturing.metadata.name}, in which that was done, has its room on the node until it has ended"
            ready = condition(snapshot, resources.CONDITION_READY, False, "", resources.CAPTURE_ENDS, why)
        elif usable:
            unknown = [each.name for each in holders if each.rung == UNKNOWN]
            absent = f", of which {', '.join(unknown)} is not heard of" if unknown else ""
            where = f"on {len(usable)} node(s){absent}{in_memory_all_the_same(snapshot)}"
            ready = condition(snapshot, resources.CONDITION_READY, True, _RESIDENT, "", where)
        elif unusable:
            name, why = next(iter(unusable.items()))
            ready = condition(snapshot, resources.CONDITION_READY, False, "", "Unusable", f"on node {name}: {why}")
        else:
            ready = condition(snapshot, resources.CONDITION_READY, False, "", "NotResident", missing)
        before, held = snapshot.status, list(artifact.held.values())
        sometimes = {resources.CONDITION_STORED: stored, resources.CONDITION_COPIED: copied}
        status = msgspec.structs.replace(
            before,
            phase=_PHASES.get(ready.reason, resources.PENDING),
            digest=digest,
            image_bytes=max((each.image_bytes for each in held), default=before.image_bytes),
            weights_bytes=max((each.weights_bytes for each in held), default=before.weights_bytes),
            gpu_bytes=max((each.gpu_bytes for each in held), default=before.gpu_bytes),
            locations=(*holders, *([stored.location] if stored and stored.location else [])),
            asleep=len(artifact.asleep),
            template_hash=snapshot.template_hash if snapshot.spec.template is not None else "",
            conditions=tuple(each for each in before.conditions if each.type not in sometimes or sometimes[each.type]),
        )
        restores = self._cold_starts.condition(snapshot) if usable else None
        restored = status.condition(resources.CONDITION_RESTORES)
        stale = environment.condition(snapshot) if snapshot.spec.template is not None else None
        conditions = (captured, ready, stale, restores, stored.condition if stored else None, copied)
        await self._writer.status(snapshot, status, *(each for each in conditions if each))
        if staged := _staged(before, digest, holders):
            await self._writer.event(snapshot, "Normal", "Staged", staged, "Stage")
        if restores and restores.status == "False" and (restored is None or restored.message != restores.message):
            await self._writer.event(snapshot, "Warning", restores.reason, restores.message, "Restore")
        if stored and stored.event:
            await self._writer.event(snapshot, "Normal" if stored.event[0] == STORED else "Warning", *stored.event, "Store")
        absent_seconds = ABSENT_AGENT_SECONDS if any(each.name not in artifact.answering for each in holders) else None
        waits = [each for each in (absent_seconds, stored.wait if stored else None) if each is not None]
        return min(waits, default=None)


def _staged(before: Status, digest: str, holders: tuple[Location, ...]) -> str:
    """On which nodes the artifact stands higher than it was known to, in words; where it first stands is told with the capture."""
    if before.digest != digest or not before.locations:
        return ""
    stood = {each.name: each.rung for each in before.locations}
    higher = [(each, stood.get(each.name, "")) for each in holders if _height(each.rung) > _height(stood.get(each.name, ""))]
    return "; ".join(f"node {each.name}: {f'from {was} ' if was else ''}to {each.rung}" for each, was in higher if was != UNKNOWN)


def _height(rung: str) -> Rung:
    """Of a location's rung on a node; ABSENT where there is none, or nobody can say."""
    return Rung.__members__.get(rung.upper(), Rung.ABSENT)


def _copied(snapshot: ModelSnapshot, artifact: Artifact, digest: str) -> Condition | None:
    """Whether as many nodes keep it as its owner wants, where that is more than one; else what the others lack."""
    wanted = snapshot.spec.copies
    if wanted == 1:
        return None
    model = replace(planned(snapshot), digest=digest)
    copies = len(counting(artifact.nodes, model))
    holds = copies >= wanted
    others = lacking(artifact.nodes, model)
    told = "; ".join([*others[:_NODES_TOLD], *([f"and {len(others) - _NODES_TOLD} nodes more"] if len(others) > _NODES_TOLD else [])])
    why = f"{copies} of {wanted} copies stand where they count; {told or 'no other node has an agent'}"
    return condition(snapshot, resources.CONDITION_COPIED, holds, "Copied", "TooFew", why)
