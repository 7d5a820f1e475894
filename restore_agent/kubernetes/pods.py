"""The pods of this node whose placeholders call: each waits for a snapshot, or for one to be taken of it.

    a placeholder calls  →  whose container?  (kernel, runtime)  →  which pod?  (API server)  →  may it?
        restore  →  replica, event Restored            anything else: event with the reason, and the container's own command, once
        capture  →  pod_captures.py                    it has an engine already  →  adoption.py

Nothing is believed that a pod could say of itself: the container is found by its pid, the pod by what the kubelet told the runtime, the
namespace whose snapshots it may use is the one that the API server has it in. Rejected: acting when the pod's status says that it runs,
which comes a second later than its placeholder's call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from gpumem.client.control import Control
from gpumem.wire.errors import GpumemError
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.engine.presets import adapted, unadapted
from restore_agent.errors import FAILURES, AgentError, ErrorKind
from restore_agent.kubernetes.adoption import Adoption
from restore_agent.kubernetes.calling_pod import CallingPod, Refused
from restore_agent.kubernetes.cri import Cri, CriError, Described
from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod
from restore_agent.kubernetes.pod_captures import PodCaptures
from restore_agent.kubernetes.pod_gpus import PodGpus
from restore_agent.kubernetes.pod_replicas import PodReplicas
from restore_agent.places.container_error import ContainerError
from restore_agent.places.placeholder import Placeholder, PlaceholderError
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.awaited import awaited
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import Origin
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.manifest import InvalidName
from restore_agent.snapshots.unusable import Unusable
from zerowake_shared.backoff import Backoff
from zerowake_shared.kubernetes.errors import ClusterError
from zerowake_shared.kubernetes.note import fitted
from zerowake_shared.phases import Phase
from zerowake_shared.pod_contract import CAPTURE, COLD, DIGEST, GPUMEM, SNAPSHOT

_FIRST_PAUSE, _PAUSE_SECONDS = 0.005, 1.0  # before a placeholder that cannot be served yet is let go of: it calls again
_SOON_SECONDS = 60.0  # an engine that ends in this time after its restore is not restored into that pod again
_LOG = logging.getLogger("zerowake.agent")


class Pods:
    """Answers the calls of placeholders: `called` is for `placeholder.listening`."""

    def __init__(
        self,
        node: Node,
        node_pods: NodePods,
        cri: Cri,
        gpus: PodGpus,
        replicas: PodReplicas,
        captures: PodCaptures,
        adoption: Adoption,
    ) -> None:
        self._node = node
        self._node_pods = node_pods
        self._cri = cri
        self._gpus = gpus
        self._replicas = replicas
        self._captures = captures
        self._adoption = adoption
        self._restored: dict[str, float] = {}  # uid of a pod → when an engine was restored into it
        node_pods.on_change(self._changed)

    async def called(self, placeholder: Placeholder) -> None:
        if (found := await self._whose(placeholder)) is None:
            placeholder.close()
            return
        about, pod = found
        self._adoption.has_called(pod, about.id)
        caller = CallingPod(placeholder, about, pod)
        try:
            if caller.is_lent_to:
                await self._open_gpumem(pod)
            if pod.metadata.labels.get(CAPTURE):
                await self._captures.capture(caller)
            elif placeholder.engine:
                await self._adoption.adopt(caller)
            else:
                await self._restore(caller)
        except (PlaceholderError, ContainerError) as error:
            if not placeholder.ended.done():
                _LOG.error("pod %s: %s", pod, error)
        except Exception:  # of one pod, whose call is nobody else's
            _LOG.exception("pod %s: its call was answered by a bug", pod)
        finally:
            if pod not in self._replicas:
                placeholder.close()

    async def _whose(self, placeholder: Placeholder) -> tuple[Described, Pod] | None:
        """The call is the first thing that a container does: the runtime may not know its pid yet, and does a moment later."""
        backoff, deadline = Backoff(_FIRST_PAUSE, _PAUSE_SECONDS), time.monotonic() + _PAUSE_SECONDS
        while True:
            try:
                about = await self._cri.of_process(placeholder.pid)
                pod = await self._node_pods.pod(about.pod_uid, about.namespace, about.pod)
                if pod and (placeholder.engine or not pod.is_leaving):  # an engine finishes its answers
                    return about, pod
                why = "its pod is being deleted"
            except (CriError, ClusterError) as error:
                why = str(error)
            if placeholder.ended.done() or time.monotonic() > deadline:
                _LOG.warning("a placeholder (pid %d) is not served: %s", placeholder.pid, why)
                return None
            await asyncio.sleep(backoff.next())

    async def _open_gpumem(self, pod: Pod) -> None:
        """Its namespace's socket, for the engine: an engine finds out by itself where there is none."""
        try:
            async with Control.connected(self._node.weights.socket, "restore agent") as control:
                await control.tenant(pod.metadata.namespace)
        except (GpumemError, OSError) as error:
            _LOG.warning("pod %s has no gpumem: %s", pod, error)

    async def _restore(self, caller: CallingPod) -> None:
        pod, phases = caller.pod, Phases()
        snapshot: Snapshot | None = None
        try:
            snapshot = await self._snapshot(caller, phases)
            with phases.phase(Phase.VERIFY):
                caller.check_allowed()
                if time.monotonic() - self._restored.pop(pod.metadata.uid, -_SOON_SECONDS) < _SOON_SECONDS:
                    raise RestoreFailed("engine-failed", f"snapshot {snapshot}: its engine ended within a minute of the restore before")
                caller.container.gpus = await self._gpus.of(caller)
            self._replicas.hold(pod, caller.container)
            caller.container.unanswerable = caller.unanswerable(snapshot.manifest.engine.port)
            stood = "a store or another node" if phases.seconds(Phase.FETCH) else self._node.staging.found(snapshot.digest)
            replica = await self._node.restore_into(caller.container, caller.model, snapshot, phases, caller.replica_id)
        except (Refused, InvalidName, RestoreFailed, NotFound, Unusable) as error:
            if caller.placeholder.ended.done():
                return  # the pod went meanwhile
            await self._start_cold(caller, snapshot, error, phases)
        except BaseException:
            self._replicas.drop(pod)
            raise
        else:
            self._replicas.restored(pod, replica)
            self._restored[pod.metadata.uid] = time.monotonic()
            parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in replica.phases)
            kept = f"; it keeps the capture pod's {', '.join(stale)}" if (stale := caller.container.contents.stale) else ""
            on = f" on {', '.join(caller.container.gpus)}" if snapshot.manifest.gpus and caller.container.gpus else ""
            note = f"{snapshot} from {stood} in {phases.total:.3f} s{on} ({parts}){kept}"
            await self._node_pods.event(pod, "Normal", "Restored", note, "Restore")

    async def _snapshot(self, caller: CallingPod, phases: Phases) -> Snapshot:
        """Its own; one on its way here is waited for, if that is sooner than a cold start. Raises what `CallingPod.snapshot` does."""
        try:
            with phases.phase(Phase.VERIFY):
                return await caller.snapshot(self._node.store)
        except NotFound as error:
            pod = caller.pod
            coming = self._node.travel.coming(pod.metadata.namespace, pod.metadata.labels[SNAPSHOT], caller.annotation(DIGEST))
            if coming is None:
                raise
            caller.check_allowed()
            note = "its snapshot is on its way to this node, and is waited for as long as that is sooner than a cold start"
            _LOG.info("pod %s: %s", pod, note)
            telling = asyncio.create_task(self._node_pods.event(pod, "Normal", "Fetching", note, "Restore"))
            try:
                with phases.phase(Phase.FETCH):
                    why = await awaited(coming, self._node.restorer.seconds_from_disk, caller.placeholder.ended)
            finally:
                await telling
            if why:
                raise NotFound(f"{error}: {why}") from None
        with phases.phase(Phase.VERIFY):
            return await caller.snapshot(self._node.store)

    async def _start_cold(self, caller: CallingPod, snapshot: Snapshot | None, failure: AgentError, phases: Phases) -> None:
        """The container becomes what it would have been; an event says why."""
        pod, why = caller.pod, str(failure)
        reason = "SnapshotRefused" if failure.kind is ErrorKind.INVALID else "RestoreFailed"
        _LOG.warning("pod %s is started cold (%s): %s", pod, reason, why)
        telling = asyncio.create_task(self._node_pods.event(pod, "Warning", reason, why, "Restore"))
        container = caller.container
        command = caller.placeholder.command
        try:
            self._node.observer.started_cold(caller.model)
            if failure.kind is not ErrorKind.INVALID and (useful := snapshot or await self._unfit(caller)):
                await self._node.second_best.lay_out_in(container, useful, phases)
            container.take()
            self._replicas.hold(pod, container)
            caller.placeholder.become()
        finally:
            await telling
        await self._node_pods.event(pod, "Normal", "ColdStarted", f"{fitted(' '.join(command), 200)}: {why}", "Restore")
        # Its own command knows nothing of memory that is lent, and takes the GPU's own: gpumem gives that back (gpu_yielding.py).
        own = {GPUMEM: "false"} if caller.is_lent_to and (adapted(command) or unadapted(command)) else {}
        with contextlib.suppress(ClusterError):  # the events have said it
            await self._node_pods.annotate(pod, {COLD: fitted(why, 1000), **own})
        try:
            record = caller.record(command, snapshot.manifest.engine if snapshot else None)
            engine = Engine(record, container, container.output(caller.model), 1)
            with phases.phase(Phase.HEALTH):
                await engine.wait_healthy()
        except (Refused, EngineError) as error:
            _LOG.warning("pod %s takes no part in serving: %s", pod, error)
        else:
            self._replicas.started(caller, None, Origin.COLD, engine, phases, why)

    async def _unfit(self, caller: CallingPod) -> Snapshot | None:
        """What there is for a cold start of its snapshot, which does not fit this node."""
        try:
            return await caller.snapshot(self._node.unfit.catalog)
        except FAILURES:  # it is not here, or counts as little as the snapshot would
            return None

    def _changed(self, pod: Pod, gone: bool) -> None:
        if gone:
            self._restored.pop(pod.metadata.uid, None)
