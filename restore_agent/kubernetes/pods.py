"""The pods of this node that wait for a snapshot, or of which one is taken.

    a placeholder calls  →  whose container?  (kernel, runtime)  →  which pod?  (API server)  →  may it?
        restore  →  replica, event Restored            anything else: event with the reason, and the container's own command, once
        capture  →  start, dump, prove in place, publish  →  annotation with the digest, or with why not
    a labelled pod without a placeholder (opted out, left alone, or made while no agent was there)  →  replica, once it is healthy

Nothing is believed that a pod could say of itself: the container is found by its pid, the pod by what the kubelet told the runtime, the
namespace whose snapshots it may use is the one that the API server has it in. Rejected: acting when the pod's status says that it runs,
which comes a second later than its placeholder's call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

from gpumem.client.control import Control
from gpumem.wire.errors import GpumemError
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.errors import FAILURES, AgentError, ErrorKind
from restore_agent.kubernetes.calling_pod import CallingPod, Refused, engine_container
from restore_agent.kubernetes.cri import Cri, CriError, Described
from restore_agent.kubernetes.injection import has_placeholder
from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod
from restore_agent.places.container import Container, ContainerError
from restore_agent.places.placeholder import Placeholder, PlaceholderError, listening
from restore_agent.sequences.capture import CaptureRequest
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import Origin, Replica
from restore_agent.sequences.restore import RestoreFailed
from restore_agent.snapshots.manifest import EngineRecord, InvalidName, check_name
from restore_agent.snapshots.store import Corrupt, NotFound, Snapshot
from zerowake_shared.backoff import Backoff
from zerowake_shared.kubernetes.errors import ClusterError
from zerowake_shared.pod_contract import CAPTURE, CAPTURE_FAILED, CAPTURED, DIGEST, GPUMEM, SNAPSHOT

_FIRST_PAUSE, _PAUSE_SECONDS = 0.005, 1.0  # before a placeholder that cannot be served yet is let go of: it calls again
_LAST_PAUSE = 30.0  # between two tries to annotate a pod
_SOON_SECONDS = 60.0  # an engine that ends in this time after its restore is not restored into that pod again
_LOG = logging.getLogger("zerowake.agent")


class Pods:
    """Use `async with Pods.served(…)`."""

    def __init__(self, node: Node, node_pods: NodePods, cri: Cri) -> None:
        self._node = node
        self._node_pods = node_pods
        self._cri = cri
        self._containers: dict[str, Container] = {}  # that hold an engine, by their pod's uid
        self._replicas: dict[str, Replica] = {}
        self._served: dict[str, str] = {}  # uid of a pod → its container whose placeholder has called
        self._restored: dict[str, float] = {}  # uid of a pod → when an engine was restored into it
        self._started: dict[str, str] = {}  # uid of a pod that runs its own command → its container, once looked at
        self._adopting: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def served(cls, node: Node, node_pods: NodePods, cri: Cri, folder: Path) -> AsyncIterator[Pods]:
        """`folder`: of the node, mounted into their containers. Raises OSError: it cannot be written."""
        pods = cls(node, node_pods, cri)
        node_pods.on_change(pods._changed)
        async with listening(folder, pods._called):
            try:
                yield pods
            finally:
                for task in (tasks := list(pods._adopting)):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for container in pods._containers.values():
                    container.let_go()

    async def _called(self, placeholder: Placeholder) -> None:
        if (found := await self._whose(placeholder)) is None:
            placeholder.close()
            return
        about, pod = found
        self._served[pod.metadata.uid] = about.id
        caller = CallingPod(placeholder, about, pod)
        try:
            if caller.annotation(GPUMEM):
                await self._open_gpumem(pod)
            if pod.metadata.labels.get(CAPTURE):
                await self._capture(caller)
            elif placeholder.engine:
                await self._adopt(caller)
            else:
                await self._restore(caller)
        except (PlaceholderError, ContainerError) as error:
            if not placeholder.ended.done():
                _LOG.error("pod %s: %s", pod, error)
        finally:
            if pod.metadata.uid not in self._containers:
                placeholder.close()

    async def _whose(self, placeholder: Placeholder) -> tuple[Described, Pod] | None:
        """The call is the first thing that a container does: the runtime may not know its pid yet, and does a moment later."""
        backoff, deadline = Backoff(_FIRST_PAUSE, _PAUSE_SECONDS), time.monotonic() + _PAUSE_SECONDS
        while True:
            try:
                about = await self._cri.of_process(placeholder.pid)
                pod = await self._node_pods.pod(about.pod_uid, about.namespace, about.pod)
                if pod and not pod.is_leaving:
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
            with phases.phase("verify"):
                snapshot = await self._snapshot(caller)
                caller.check_allowed()
                if time.monotonic() - self._restored.pop(pod.metadata.uid, -_SOON_SECONDS) < _SOON_SECONDS:
                    raise RestoreFailed("engine-failed", f"snapshot {snapshot}: its engine ended within a minute of the restore before")
            self._containers[pod.metadata.uid] = caller.container
            replica = await self._node.restore_into(caller.container, caller.model, snapshot, phases)
        except (Refused, InvalidName, RestoreFailed, NotFound, Corrupt) as error:
            if caller.placeholder.ended.done():
                return  # the pod went meanwhile
            await self._start_cold(caller, snapshot, error, phases)
        except BaseException:
            self._containers.pop(pod.metadata.uid, None)
            raise
        else:
            self._has(pod, replica)
            self._restored[pod.metadata.uid] = time.monotonic()
            parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in replica.phases)
            await self._node_pods.event(pod, "Normal", "Restored", f"{snapshot} in {phases.total:.3f} s ({parts})", "Restore")

    async def _snapshot(self, caller: CallingPod) -> Snapshot:
        """The one that its label names, in its own namespace. Raises Refused, InvalidName, NotFound, Corrupt."""
        metadata = caller.pod.metadata
        if not metadata.labels.get(SNAPSHOT):
            raise Refused(f"the pod has no label {SNAPSHOT}")
        if metadata.namespace != caller.about.namespace:
            raise Refused(f"the runtime has the pod in namespace {caller.about.namespace}, the API server in {metadata.namespace}")
        name = check_name("name", metadata.labels[SNAPSHOT])
        return await asyncio.to_thread(self._node.store.get, metadata.namespace, name, caller.annotation(DIGEST))

    async def _start_cold(self, caller: CallingPod, snapshot: Snapshot | None, failure: AgentError, phases: Phases) -> None:
        """The container becomes what it would have been; an event says why."""
        pod, uid, why = caller.pod, caller.pod.metadata.uid, str(failure)
        reason = "SnapshotRefused" if failure.kind is ErrorKind.INVALID else "RestoreFailed"
        _LOG.warning("pod %s is started cold (%s): %s", pod, reason, why)
        telling = asyncio.create_task(self._node_pods.event(pod, "Warning", reason, why, "Restore"))
        container = caller.container
        command = caller.placeholder.command
        try:
            self._node.observer.started_cold(caller.model)
            container.take()
            self._containers[uid] = container
            caller.placeholder.become()
        finally:
            await telling
        await self._node_pods.event(pod, "Normal", "ColdStarted", f"{' '.join(command)[:200]}: {why}", "Restore")
        try:
            record = caller.record(command, snapshot.manifest.engine if snapshot else None)
            engine = Engine(record, container, container.output(caller.model), 1)
            with phases.phase("health"):
                await engine.wait_healthy()
        except (Refused, EngineError) as error:
            _LOG.warning("pod %s takes no part in serving: %s", pod, error)
        else:
            self._has(pod, self._add(caller, None, Origin.COLD, engine, phases, why))

    async def _capture(self, caller: CallingPod) -> None:
        pod, phases = caller.pod, Phases()
        if caller.annotation(CAPTURED) or caller.annotation(CAPTURE_FAILED):
            caller.placeholder.exit(0 if caller.annotation(CAPTURED) else 1)
            return
        name = pod.metadata.labels[CAPTURE]

        def progress(phase: str, done: int, total: int) -> None:
            if not done:
                _LOG.info("snapshot %s/%s of pod %s: %s", pod.metadata.namespace, name, pod, phase)

        try:
            caller.check_allowed()
            path, body = caller.canary()
            request = CaptureRequest(
                namespace=check_name("namespace", pod.metadata.namespace),
                name=check_name("name", name),
                model=caller.model,
                engine=caller.record(caller.placeholder.command),
                canary_path=path,
                canary_body=body,
                replace=True,
            )
            captured = await self._node.capture(request, progress, phases, caller.container.open)
        except FAILURES as error:
            if caller.placeholder.ended.done() and pod.metadata.uid not in self._node_pods.pods:
                return  # it was deleted meanwhile
            _LOG.error("no snapshot %s/%s of pod %s: %s", pod.metadata.namespace, name, pod, error)
            await self._node_pods.event(pod, "Warning", "CaptureFailed", str(error), "Capture")
            await self._annotate(pod, {CAPTURE_FAILED: str(error)[:2000]})
            code = 1
        else:
            manifest = captured.snapshot.manifest
            sizes = f"{manifest.image_bytes / 1e6:.0f} MB, of which CRIU restores {manifest.skeleton_bytes / 1e6:.1f} MB"
            await self._annotate(pod, {CAPTURED: captured.snapshot.digest})
            await self._node_pods.event(pod, "Normal", "Captured", f"{captured.snapshot} in {phases.total:.1f} s: {sizes}", "Capture")
            code = 0
        if not caller.placeholder.ended.done():
            caller.placeholder.exit(code)
            await asyncio.wait([caller.placeholder.ended], timeout=_PAUSE_SECONDS)

    async def _capture_missed(self, pod: Pod) -> None:
        if pod.metadata.annotations.get(CAPTURED) or pod.metadata.annotations.get(CAPTURE_FAILED):
            return
        why = "its container was made while this node's agent was not connected to the container runtime"
        _LOG.error("no snapshot of pod %s: %s", pod, why)
        await self._node_pods.event(pod, "Warning", "CaptureFailed", why, "Capture")
        await self._annotate(pod, {CAPTURE_FAILED: why})

    async def _annotate(self, pod: Pod, annotations: dict[str, str]) -> None:
        """Until it is written: the controller waits for it. A pod that is gone needs none."""
        backoff = Backoff(_PAUSE_SECONDS, _LAST_PAUSE)
        while True:
            try:
                await self._node_pods.annotate(pod, annotations)
                return
            except ClusterError as error:
                if error.status in (404, 409, 422):
                    return
                pause = backoff.next()
                _LOG.warning("pod %s is not annotated yet, again in %.0f s: %s", pod, pause, error)
            await asyncio.sleep(pause)

    async def _adopt(self, caller: CallingPod) -> None:
        """An engine that another agent has restored."""
        snapshot: Snapshot | None = None
        with contextlib.suppress(Refused, InvalidName, NotFound, Corrupt):
            snapshot = await self._snapshot(caller)
        try:
            record = caller.record(caller.placeholder.command, snapshot.manifest.engine if snapshot else None)
        except Refused as error:
            _LOG.warning("pod %s takes no part in serving: %s", caller.pod, error)
            return
        self._take(caller, record, snapshot, Origin.RESTORED, caller.placeholder.engine)

    def _look_at(self, pod: Pod) -> None:
        """One that runs its own command becomes a replica once it is healthy; again, when its container was started again."""
        for status in pod.status.container_statuses:
            running, container = status.name == engine_container(pod) and "running" in status.state, status.container_id.rpartition("/")[2]
            if running and container not in (self._served.get(pod.metadata.uid), self._started.get(pod.metadata.uid)):
                self._started[pod.metadata.uid] = container
                task = asyncio.create_task(self._adopt_started(pod, container), name=f"pod {pod} runs its own command")
                self._adopting.add(task)
                task.add_done_callback(self._adopting.discard)

    async def _adopt_started(self, pod: Pod, container: str) -> None:
        snapshot: Snapshot | None = None
        with contextlib.ExitStack() as unless_taken:
            try:
                about = await self._cri.describe(container)
                if has_placeholder(about.pid):
                    return  # it calls
                if pod.metadata.labels.get(CAPTURE):
                    await self._capture_missed(pod)
                    return
                caller = CallingPod(Placeholder(None, about.pid), about, pod)
                unless_taken.callback(caller.placeholder.close)
                with contextlib.suppress(Refused, InvalidName, NotFound, Corrupt):
                    snapshot = await self._snapshot(caller)
                record = caller.record(("started",), snapshot.manifest.engine if snapshot else None)
                await Engine(record, caller.container, caller.container.output(caller.model), 1).wait_healthy()
            except (CriError, Refused, EngineError, OSError) as error:
                _LOG.warning("pod %s takes no part in serving: %s", pod, error)
            else:
                unless_taken.pop_all()
                self._take(caller, record, None, Origin.COLD, 1)

    def _take(self, caller: CallingPod, record: EngineRecord, snapshot: Snapshot | None, origin: Origin, pid: int) -> None:
        container = caller.container
        container.take()
        self._containers[caller.pod.metadata.uid] = container
        engine = Engine(record, container, container.output(caller.model), pid)
        replica = self._add(caller, snapshot, origin, engine, Phases(), "it runs, and was not restored by this agent")
        self._has(caller.pod, replica)
        _LOG.info("pod %s goes on as replica %s", caller.pod, replica.id)

    def _add(self, caller: CallingPod, snapshot: Snapshot | None, origin: Origin, engine: Engine, phases: Phases, detail: str) -> Replica:
        namespace = caller.pod.metadata.namespace
        return self._node.replicas.add(caller.model, snapshot, origin, engine, phases, detail=detail, namespace=namespace)

    def _has(self, pod: Pod, replica: Replica) -> None:
        self._replicas[pod.metadata.uid] = replica
        if (now := self._node_pods.pods.get(pod.metadata.uid)) is None or now.is_leaving:
            self._node.replicas.retire(replica.id, "its pod is being deleted")

    def _changed(self, pod: Pod, gone: bool) -> None:
        """A pod that is being deleted gets no more requests, before its engine hears of it."""
        uid = pod.metadata.uid
        if (gone or pod.is_leaving) and (replica := self._replicas.get(uid)):
            self._node.replicas.retire(replica.id, "its pod is being deleted")
        if not gone and not pod.is_leaving and not {SNAPSHOT, CAPTURE}.isdisjoint(pod.metadata.labels):
            self._look_at(pod)
        if gone:
            self._containers.pop(uid, None)
            self._started.pop(uid, None)
            self._replicas.pop(uid, None)
            self._served.pop(uid, None)
            self._restored.pop(uid, None)
