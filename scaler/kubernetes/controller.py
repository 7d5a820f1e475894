"""The ModelSnapshot controller: what an object asks for becomes a captured or adopted artifact, and its status says where that is.

One replica of the scaler leads and does this. An object is looked at when it changes, when its capture pod does, and when an agent's
stream says that its artifact moved; each look computes the whole status anew from these three and writes it if it differs. Nothing is
remembered between looks but how often a capture failed, so a new leader goes on where the old one stopped.

A capture pod is named after the hash of what it captures, and is deleted only after its digest stands in the status: a look that is made
with old news finds the name taken, or its own earlier write (`SnapshotWriter.latest`), and never starts a second capture. None is made
before an agent is there to capture it, nor of what its store has already (finding.py). A holder whose agent does not answer stays listed
until its agent denies having the artifact or the node itself is gone: agents are rolled, and that must not cost a capture. When all holders
are gone so, a captured snapshot is fetched from its store (recovery.py), or else captured again.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Coroutine

import msgspec

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.nodes import Nodes
from scaler.kubernetes import capture_pod, environment, resources
from scaler.kubernetes.artifact import Artifact, holders_of, sleepers_of
from scaler.kubernetes.cold_starts import ColdStarts
from scaler.kubernetes.declarations import planned
from scaler.kubernetes.election import lead
from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.failed_capture import FailedCapture, FailedCaptures
from scaler.kubernetes.finding import Finding
from scaler.kubernetes.pod_patch import NodeSetup
from scaler.kubernetes.recovery import Recovery
from scaler.kubernetes.refusals import Refusals
from scaler.kubernetes.removal import Removal
from scaler.kubernetes.residence import Residence
from scaler.kubernetes.resources import ModelSnapshot, Pod, Status, condition
from scaler.kubernetes.snapshot_writer import SnapshotWriter
from scaler.kubernetes.source_conditions import SourceConditions
from scaler.kubernetes.storing import Storing
from scaler.kubernetes.taken_names import TakenNames
from scaler.kubernetes.unmatched import Unmatched
from scaler.kubernetes.workqueue import WorkQueue
from scaler.plan.policy import prefer_for_capture
from scaler.plan.world import Node, World
from zerowake_shared import background, pod_contract
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError, Conflict, NotFound
from zerowake_shared.kubernetes.informer import Informer, Key
from zerowake_shared.kubernetes.resource import PODS

log = logging.getLogger(__name__)

_NO_AGENT = (
    "no restore agent is connected, and an agent is what captures it: one runs on every node that has the labels of the chart's value "
    "agent.nodeSelector; look at the pods of the DaemonSet zerowake-agent, and at the scaler's log"
)
_UNREPORTED = "captured; its node's agent has not reported it yet"
_MISSED_SECONDS = 1.0  # until another try, where the agent came too late for the first
_CONTENTS_SECONDS = 15.0  # between two looks at the ConfigMaps and Secrets behind an environment


async def run_controller(
    cluster: Cluster,
    snapshots: Informer[ModelSnapshot],
    nodes: Nodes,
    setup: NodeSetup,
    *,
    labelled: Informer[EnginePod],
    names: TakenNames,
    unmatched: Unmatched,
    refusals: Refusals,
    sources: SourceConditions,
    namespace: str,
    identity: str,
    lease: str = resources.CONTROLLER_LEASE,
    also: Callable[[], Coroutine[object, object, None]] | None = None,
) -> None:
    """Runs the controller whenever this process holds the lease in `namespace`; until cancelled. Every replica of the scaler calls it.

    snapshots: the running informer of all ModelSnapshots, shared with the webhook. nodes: the agents, by their streams.
    labelled: the running informer of all pods with a snapshot's label.
    names, unmatched, refusals: tell of objects that name another namespace's model, and one that has no ModelSnapshot, and of what agents
    did not fetch or stage. sources: what is to be said of a model's sources of demand.
    identity: this replica's own name (its pod's). also: what else the leader alone does, for as long as it leads.
    """
    controller = Controller(cluster, snapshots, nodes, setup, labelled, names, sources)

    async def work() -> None:
        async with (
            background.beside(names.run(), "names that are taken"),
            background.beside(unmatched.run(), "unmatched models"),
            background.beside(refusals.run(), "refusals"),
            background.beside(also(), "what the leader does beside") if also else contextlib.nullcontext(),
        ):
            await controller.run()

    await lead(cluster, namespace, lease, identity, work)


class Controller:
    """Brings every ModelSnapshot's status to what pods and agents say, and captures what is not there. Only the leader runs it."""

    def __init__(
        self,
        cluster: Cluster,
        snapshots: Informer[ModelSnapshot],
        nodes: Nodes,
        setup: NodeSetup,
        labelled: Informer[EnginePod],
        names: TakenNames,
        sources: SourceConditions,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._cluster = cluster
        self._snapshots = snapshots
        self._nodes = nodes
        self._setup = setup
        self._pods: Informer[Pod] | None = None
        self._queue: WorkQueue[Key] = WorkQueue()
        self._writer = SnapshotWriter(cluster, clock, sources.of)
        self._removal = Removal(cluster, self._writer, snapshots, nodes)
        self._failed = FailedCaptures()
        self._healing: dict[Key, FailedCapture] = {}  # when a damaged one may be captured again
        self._storing = Storing(nodes, clock, self._ended)
        self._recovery = Recovery(nodes, self._ended)
        self._finding = Finding(nodes, self._writer, clock, self._ended)
        self._heard: dict[str, Node] = {}  # by address, as each was when it was heard of last
        self._labelled = labelled
        self._cold_starts = ColdStarts(cluster, labelled, clock)
        self._residence = Residence(self._writer, names, self._cold_starts, self._storing, clock)
        snapshots.on_change(self._snapshot_changed)
        names.on_change(lambda snapshot: self._snapshot_changed(None, snapshot))
        sources.on_change(lambda snapshot: self._snapshot_changed(None, snapshot))
        labelled.on_change(self._labelled_changed)
        nodes.on_change(self._node_changed)
        nodes.on_place(lambda _: self._placed())

    async def run(self) -> None:
        """Leads: works until cancelled."""
        self._queue = WorkQueue()
        self._writer.forget_all()
        async with self._cluster.follow(PODS, Pod, labels=pod_contract.CAPTURE) as pods:
            await self._snapshots.synced.wait()
            await pods.synced.wait()
            self._pods = pods
            pods.on_change(self._pod_changed)
            for snapshot in self._snapshots:
                self._queue.add(snapshot.key)
            for pod in self._labelled:
                self._labelled_changed(None, pod)
            log.info("this replica leads: %d ModelSnapshots", len(self._snapshots))
            try:
                await self._queue.run(self._look)
            finally:
                self._pods = None
                await self._storing.close()
                await self._recovery.close()
                await self._finding.close()

    # --- what makes an object be looked at

    def _snapshot_changed(self, old: ModelSnapshot | None, new: ModelSnapshot | None) -> None:
        changed = new or old
        if changed is not None and self._pods is not None:
            self._queue.add(changed.key)

    def _ended(self, key: Key) -> None:
        """What went on in the background for an object has ended."""
        if self._pods is not None:
            self._queue.add(key)

    def _pod_changed(self, old: Pod | None, new: Pod | None) -> None:
        changed = new or old
        if changed is not None:
            self._queue.add((changed.metadata.namespace, changed.metadata.labels.get(pod_contract.CAPTURE, "")))

    def _labelled_changed(self, old: EnginePod | None, new: EnginePod | None) -> None:
        """How far a pod is does not count: only that it came, and what is written on it."""
        if new is None or self._pods is None:
            return
        if old is not None and old.metadata.annotations == new.metadata.annotations:
            return
        self._queue.add_after((new.metadata.namespace, new.metadata.labels.get(pod_contract.SNAPSHOT, "")), 0.1)

    def _node_changed(self, node: Node) -> None:
        """Called at every change of a replica too: only what changed of artifacts counts."""
        before = self._heard.get(node.address, Node(node.address))
        self._heard[node.address] = node
        names = before.residencies.keys() | node.residencies.keys()
        changed = {name for name in names if before.residencies.get(name) != node.residencies.get(name)}
        slept, sleep = sleepers_of(before), sleepers_of(node)
        moved = {of for of in slept.keys() | sleep.keys() if slept.get(of) != sleep.get(of)}
        came_or_went = before.synced is not node.synced
        if not (changed or moved or came_or_went) or self._pods is None:
            return
        for snapshot in self._snapshots:
            listed = came_or_went and any(each.name == node.name for each in snapshot.status.holders)
            waits = came_or_went and not (snapshot.status.holds(resources.CONDITION_CAPTURED) and snapshot.status.holders)
            dozes = (snapshot.metadata.namespace, snapshot.model) in moved
            if listed or waits or dozes or SnapshotName(snapshot.metadata.namespace, snapshot.artifact_name) in changed:
                self._queue.add_after(snapshot.key, 0.1)  # news of a node come in bursts

    def _placed(self) -> None:
        """Which nodes take pods has changed: that counts where copies are counted, and where one is to be fetched."""
        for snapshot in self._snapshots if self._pods is not None else ():
            if snapshot.spec.copies > 1 or not snapshot.status.holders:
                self._queue.add_after(snapshot.key, 0.1)

    # --- one look

    async def _look(self, key: Key) -> float | None:
        await self._cold_starts.tell(key)
        snapshot = self._writer.latest(self._snapshots.get(*key))
        if snapshot is None:
            for each in (self._writer, self._storing, self._recovery, self._finding, self._failed):
                each.forget(key)
            self._healing.pop(key, None)
            return None
        if snapshot.metadata.deletion_timestamp:
            for each in (self._storing, self._recovery, self._finding):
                each.forget(key)
            return await self._removal.remove(snapshot, self._pods_of(snapshot).values())
        if resources.FINALIZER not in snapshot.metadata.finalizers:
            snapshot = await self._writer.finalizers(snapshot, (*snapshot.metadata.finalizers, resources.FINALIZER))
        if snapshot.spec.artifact is not None:
            return await self._adopt(snapshot, snapshot.spec.artifact.digest)
        wait = await self._capture(snapshot, await self._contents(snapshot))
        if not environment.has_references(snapshot):
            return wait
        return min(wait, _CONTENTS_SECONDS) if wait is not None else _CONTENTS_SECONDS

    async def _contents(self, snapshot: ModelSnapshot) -> str:
        """As they are, or as they were where they cannot be read."""
        try:
            return await environment.contents(self._cluster, snapshot)
        except ClusterError as error:
            log.warning("%s/%s: %s", *snapshot.key, why := environment.unreadable(error))
            if error.status == 403:
                await self._writer.event(snapshot, "Warning", "EnvironmentUnreadable", why)
            return snapshot.status.contents_hash

    async def _adopt(self, snapshot: ModelSnapshot, digest: str) -> float | None:
        artifact = Artifact(snapshot, digest, self._nodes)
        missing = f"no node's agent has {snapshot.metadata.namespace}/{snapshot.artifact_name}@{digest[:12]}"
        holders = await holders_of(self._cluster, snapshot.status, artifact)
        captured = condition(snapshot, resources.CONDITION_CAPTURED, bool(holders), "Adopted", "NotFound", missing)
        return await self._residence.write(snapshot, artifact, digest, captured, holders, missing)

    async def _capture(self, snapshot: ModelSnapshot, contents: str) -> float | None:
        wanted, status = snapshot.template_hash, snapshot.status
        current = status.template_hash == wanted and status.contents_hash == contents
        pods = self._pods_of(snapshot)
        for name, each in pods.items():
            if name != capture_pod.name_of(snapshot) or each.metadata.annotations.get(pod_contract.CONTENTS, "") != contents:
                await self._cluster.delete(PODS, each.metadata.namespace, each.metadata.name, uid=each.metadata.uid)
                if name == capture_pod.name_of(snapshot):
                    return None  # its end brings us here again
        pod = pods.get(capture_pod.name_of(snapshot))
        if status.digest and current:
            kept, wait = await self._keep(snapshot, pod)
            if kept:
                return wait
        if pod is not None and pod.metadata.deletion_timestamp is None:
            return await self._follow_capture(snapshot, pod)
        if pod is not None:
            return None  # one is ending; its end brings us here again
        if status.digest and status.template_hash == wanted and not current:
            log.info("%s/%s: what stands behind its environment has changed; it is captured again", *snapshot.key)
        return await self._start_capture(snapshot, contents)

    async def _keep(self, snapshot: ModelSnapshot, pod: Pod | None) -> tuple[bool, float | None]:
        """Whether what was captured is still somewhere, so that nothing is to be captured; and when to look again."""
        status = snapshot.status
        artifact = Artifact(snapshot, status.digest, self._nodes)
        holders = await holders_of(self._cluster, status, artifact)
        captured = condition(snapshot, resources.CONDITION_CAPTURED, True, "Captured", "", "")
        damaged = artifact.unusable(holders)
        if damaged and self._heals(snapshot):
            note = f"{damaged}; it is captured again"
            await self._writer.event(snapshot, "Warning", "SnapshotDamaged", note)
            log.warning("%s/%s: %s", *snapshot.key, note)
            return False, None
        if holders:
            self._recovery.forget(snapshot.key)
        lost = None if holders else self._recovery.state(snapshot)
        if lost and not lost.failed:
            return True, await self._residence.write(snapshot, artifact, status.digest, captured, holders, lost.message)
        if holders or not (status.holders or lost):
            if pod is not None:
                await self._cluster.delete(PODS, pod.metadata.namespace, pod.metadata.name, uid=pod.metadata.uid)
            wait = await self._residence.write(snapshot, artifact, status.digest, captured, holders, _UNREPORTED, pod)
            return True, self._healing[snapshot.key].not_before - self._clock.now() if damaged else wait
        log.warning("%s/%s: no node has %s any more; it is captured again", *snapshot.key, status.digest)
        if lost:
            await self._writer.event(snapshot, "Warning", "NotFetched", f"{lost.message}; it is captured again")
        return False, None

    def _heals(self, snapshot: ModelSnapshot) -> bool:
        """Whether a damaged one is captured again now: at once, and then less and less often, since something damages it."""
        healing = self._healing.setdefault(snapshot.key, FailedCapture())
        if self._clock.now() < healing.not_before:
            return False
        healing.not_before = self._clock.now() + healing.backoff.next()
        return True

    async def _start_capture(self, snapshot: ModelSnapshot, contents: str) -> float | None:
        if reason := capture_pod.refusal(snapshot):
            await self._writer.event(snapshot, "Warning", "SnapshotRefused", reason)
            await self._writer.not_captured(snapshot, resources.FAILED, "TemplateRefused", reason)
            return None
        failed = self._failed.of(snapshot, contents)
        if failed and (wait := failed.not_before - self._clock.now()) > 0:
            await self._writer.not_captured(snapshot, resources.FAILED, failed.reason, failed.why)
            return wait if wait < math.inf else None
        if not any(node.synced for node in self._nodes):
            await self._writer.not_captured(snapshot, resources.PENDING, "NoAgent", _NO_AGENT)
            return None  # the first that comes brings us here again
        if failed is None:
            found, again = await self._finding.look(snapshot, contents)
            if found:
                return again
        return await self._make_pod(snapshot, contents)

    async def _make_pod(self, snapshot: ModelSnapshot, contents: str) -> float | None:
        world = World(now=0.0, models={}, nodes=tuple(self._nodes))  # where there is room now is all that counts
        preferred = prefer_for_capture(world, planned(snapshot))
        try:
            await self._cluster.create(PODS, snapshot.metadata.namespace, capture_pod.pod_for(snapshot, self._setup, preferred, contents))
        except Conflict:
            return await self._name_taken(snapshot)
        except ClusterError as error:
            if error.status in (0, 429) or error.status >= 500:
                raise
            return await self._capture_failed(snapshot, f"the capture pod was refused: {error}")
        await self._writer.not_captured(snapshot, resources.CAPTURING, "Capturing", f"pod {capture_pod.name_of(snapshot)} was created")
        return None

    async def _name_taken(self, snapshot: ModelSnapshot) -> float | None:
        """Ours, which the informer will bring, or somebody's."""
        name = capture_pod.name_of(snapshot)
        try:
            pod = await self._cluster.get(PODS, snapshot.metadata.namespace, name, Pod)
        except NotFound:
            return 1.0
        if pod.metadata.labels.get(pod_contract.CAPTURE) == snapshot.metadata.name:
            return 1.0
        return await self._capture_failed(snapshot, f"a pod {name} that is not the controller's is in the way; delete it")

    async def _follow_capture(self, snapshot: ModelSnapshot, pod: Pod) -> float | None:
        progress = capture_pod.progress(pod)
        if progress.digest:
            self._failed.forget_template(snapshot)
            artifact = Artifact(snapshot, progress.digest, self._nodes)
            captured = condition(snapshot, resources.CONDITION_CAPTURED, True, "Captured", "", "")
            holders = await holders_of(self._cluster, Status(), artifact)
            status = msgspec.structs.replace(snapshot.status, contents_hash=pod.metadata.annotations.get(pod_contract.CONTENTS, ""))
            snapshot = msgspec.structs.replace(snapshot, status=status)
            await self._residence.write(snapshot, artifact, progress.digest, captured, holders, _UNREPORTED, pod)
            note = f"captured on node {pod.spec.node_name or '?'} as {progress.digest[:12]}"
            await self._writer.event(snapshot, "Normal", "Captured", note)
        elif progress.failure:
            await self._capture_failed(snapshot, progress.failure, pod.metadata.uid, missed=progress.missed, for_good=progress.for_good)
        else:
            await self._writer.not_captured(snapshot, resources.CAPTURING, "Capturing", progress.detail)
            return None
        await self._cluster.delete(PODS, pod.metadata.namespace, pod.metadata.name, uid=pod.metadata.uid)
        return None

    async def _capture_failed(
        self, snapshot: ModelSnapshot, reason: str, pod: str = "", *, missed: bool = False, for_good: bool = False
    ) -> float | None:
        failed = self._failed.again(snapshot)
        if pod and failed.pod == pod:
            return None if failed.not_before == math.inf else failed.not_before - self._clock.now()
        failed.pod, failed.contents = pod, None
        if for_good:
            wait, failed.reason, then = math.inf, "CaptureRefused", "it is tried again when the template changes"
        else:
            wait = _MISSED_SECONDS if missed and not failed.why else failed.backoff.next()
            then = f"tried again in {wait:.0f} s"
        failed.not_before, failed.why = self._clock.now() + wait, reason
        await self._writer.not_captured(snapshot, resources.FAILED, failed.reason, reason)
        await self._writer.event(snapshot, "Warning", failed.reason, f"{reason}; {then}")
        return wait if wait < math.inf else None

    def _pods_of(self, snapshot: ModelSnapshot) -> dict[str, Pod]:
        """Its capture pods. The label is not enough: anybody can set one, and what they own is not ours to read or delete."""
        namespace, name = snapshot.key
        return {
            pod.metadata.name: pod
            for pod in self._pods or ()
            if pod.metadata.namespace == namespace
            and pod.metadata.labels.get(pod_contract.CAPTURE) == name
            and any(owner.get("uid") == snapshot.metadata.uid for owner in pod.metadata.owner_references)
        }
