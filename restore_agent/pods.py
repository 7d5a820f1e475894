"""The pods of this node that wait for a snapshot, or of which one is taken.

    a placeholder calls  →  whose container?  (kernel, runtime)  →  which pod?  (API server)  →  may it?
        restore  →  replica, event Restored            anything else: event with the reason, and the container's own command, once
        capture  →  start, dump, prove in place, publish  →  annotation with the digest, or with why not
    a labelled pod without a placeholder (opted out, or the webhook left it alone)  →  replica, once it is healthy

Nothing is believed that a pod could say of itself: the container is found by its pid, the pod by what the kubelet told the runtime, the
namespace whose snapshots it may use is the one that the API server has it in. Rejected: acting when the pod's status says that it runs,
which comes a second later than its placeholder's call.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from restore_agent import metrics
from restore_agent.capture import CaptureRequest
from restore_agent.chunks import CorruptChunk
from restore_agent.cluster import Cluster, ClusterError, Pod
from restore_agent.container import Container, ContainerError
from restore_agent.cri import Cri, CriError, Described
from restore_agent.criu import CriuError
from restore_agent.cuda import CudaError
from restore_agent.engine import Engine, EngineError
from restore_agent.images import ImageError
from restore_agent.manifest import EngineRecord, InvalidName, check_name
from restore_agent.node import Node
from restore_agent.oracle import Unproved
from restore_agent.phases import Phases
from restore_agent.placeholder import Placeholder, PlaceholderError, listening
from restore_agent.replicas import Origin, Replica
from restore_agent.restore import RestoreFailed
from restore_agent.sandbox import CONTROL_DIRECTORY, SandboxError
from restore_agent.store import Corrupt, NotFound, Snapshot
from restore_agent.weights import WeightsError

SNAPSHOT, CAPTURE = "thaw.dev/snapshot", "thaw.dev/capture"  # labels: name of the ModelSnapshot
# Annotations, written by the webhook and the controller.
CONTAINER, PORT, HEALTH, MODEL, DIGEST = (f"thaw.dev/{word}" for word in ("container", "port", "health", "model", "digest"))
ENTRYPOINT, CANARY = (f"thaw.dev/{word}" for word in ("entrypoint", "canary"))
CAPTURED, CAPTURE_FAILED = "thaw.dev/captured", "thaw.dev/capture-failed"  # by this agent
_GPUMEM = Path("/run/gpumem")  # the folders of the node that a pod may mount: this, and the placeholder's
_FIRST_PAUSE, _PAUSE_SECONDS = 0.005, 1.0  # before a placeholder that cannot be served yet is let go of: it calls again
_SOON_SECONDS = 60.0  # an engine that ends in this time after its restore is not restored into that pod again
_CALL_SECONDS = 3.0  # in which the placeholders of an agent that was replaced have called the new one
_LOG = logging.getLogger("thaw.agent")
_CAPTURE_ERRORS = (
    SandboxError,
    EngineError,
    CriuError,
    CudaError,
    WeightsError,
    ImageError,
    RestoreFailed,
    Unproved,
    CorruptChunk,
    Corrupt,
    InvalidName,
    PlaceholderError,
    OSError,
)


class Refused(Exception):
    """A pod asks for what it may not have."""


@dataclass(frozen=True)
class Caller:
    """A placeholder, and all that is known of it."""

    placeholder: Placeholder
    about: Described
    pod: Pod

    @functools.cached_property
    def container(self) -> Container:
        own = next((each for each in self.pod.spec.containers if each.name == self.about.name), None)
        volatile = {volume.name for volume in self.pod.spec.volumes if volume.empty_dir is not None}
        paths = [mount.mount_path for mount in own.volume_mounts if mount.name in volatile] if own else []
        paths = [path for path in paths if Path(path) != CONTROL_DIRECTORY]
        return Container(self.placeholder, self.about.image, self.about.address, paths)

    @property
    def model(self) -> str:
        return self.annotation(MODEL) or self.pod.metadata.labels.get(SNAPSHOT) or self.pod.metadata.labels.get(CAPTURE, "")

    def annotation(self, key: str) -> str:
        return self.pod.metadata.annotations.get(key, "")

    def record(self, command: tuple[str, ...], otherwise: EngineRecord | None = None) -> EngineRecord:
        """How the engine is reached: by the pod's annotations, else by the snapshot's manifest, else by its first port. Raises Refused."""
        fields = {"port": self.annotation(PORT), "health_path": self.annotation(HEALTH)}
        given = {key: value for key, value in fields.items() if value}
        known: dict[str, object] = otherwise.model_dump(include={"port", "health_path"}) if otherwise else {}
        own = next((each for each in self.pod.spec.containers if each.name == self.about.name), None)
        if not known and own and own.ports:
            known = {"port": own.ports[0].container_port}
        try:
            return EngineRecord.model_validate({**known, **given, "command": command})
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(f"annotation thaw.dev/{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class Pods:
    """Use `async with Pods.served(…)`."""

    def __init__(self, node: Node, cluster: Cluster, cri: Cri, folder: Path) -> None:
        self._node = node
        self._folders = (folder, _GPUMEM)
        self._cluster = cluster
        self._cri = cri
        self._containers: dict[str, Container] = {}  # that hold an engine, by their pod's uid
        self._replicas: dict[str, Replica] = {}
        self._served: set[str] = set()  # uids of pods whose placeholder has called
        self._restored: dict[str, float] = {}  # uid of a pod → when an engine was restored into it
        self._started: dict[str, str] = {}  # uid of a pod that runs its own command → its container, once looked at
        self._adopting: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def served(cls, node: Node, cluster: Cluster, cri: Cri, folder: Path) -> AsyncIterator[Pods]:
        """`folder`: of the node, mounted into the pods. Raises OSError: it cannot be written."""
        pods = cls(node, cluster, cri, folder)
        cluster.on_change(pods._changed)
        async with listening(folder, pods._called):
            adopting = asyncio.create_task(pods._adopt_cold(), name="pods that were started cold")
            try:
                yield pods
            finally:
                for task in (tasks := [adopting, *pods._adopting]):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for container in pods._containers.values():
                    container.let_go()

    async def _called(self, placeholder: Placeholder) -> None:
        if (found := await self._whose(placeholder)) is None:
            placeholder.close()
            return
        about, pod = found
        self._served.add(pod.metadata.uid)
        caller = Caller(placeholder, about, pod)
        try:
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
        pause, deadline = _FIRST_PAUSE, time.monotonic() + _PAUSE_SECONDS
        while True:
            try:
                about = await self._cri.of_process(placeholder.pid)
                pod = await self._cluster.pod(about.pod_uid, about.namespace, about.pod)
                if pod and not pod.is_leaving:
                    return about, pod
                why = "its pod is being deleted"
            except (CriError, ClusterError) as error:
                why = str(error)
            if placeholder.ended.done() or time.monotonic() > deadline:
                _LOG.warning("a placeholder (pid %d) is not served: %s", placeholder.pid, why)
                return None
            await asyncio.sleep(pause)
            pause *= 2

    async def _restore(self, caller: Caller) -> None:
        pod, phases = caller.pod, Phases()
        snapshot: Snapshot | None = None
        try:
            with phases.phase("verify"):
                snapshot = await self._snapshot(caller)
                _check_allowed(caller, self._folders)
                if time.monotonic() - self._restored.pop(pod.metadata.uid, -_SOON_SECONDS) < _SOON_SECONDS:
                    raise RestoreFailed("engine-failed", f"snapshot {snapshot}: its engine ended within a minute of the restore before")
            self._containers[pod.metadata.uid] = caller.container
            replica = await self._node.restore_into(caller.container, caller.model, snapshot, phases)
        except (Refused, InvalidName) as error:
            await self._start_cold(caller, snapshot, "SnapshotRefused", str(error), phases)
        except (RestoreFailed, NotFound, Corrupt) as error:
            if caller.placeholder.ended.done():
                return  # the pod went meanwhile
            await self._start_cold(caller, snapshot, "RestoreFailed", str(error), phases)
        except BaseException:
            self._containers.pop(pod.metadata.uid, None)
            raise
        else:
            self._has(pod, replica)
            self._restored[pod.metadata.uid] = time.monotonic()
            parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in replica.phases)
            await self._cluster.event(pod, "Normal", "Restored", f"{snapshot} in {phases.total:.3f} s ({parts})", "Restore")

    async def _snapshot(self, caller: Caller) -> Snapshot:
        """The one that its label names, in its own namespace. Raises Refused, InvalidName, NotFound, Corrupt."""
        metadata = caller.pod.metadata
        if not metadata.labels.get(SNAPSHOT):
            raise Refused(f"the pod has no label {SNAPSHOT}")
        if metadata.namespace != caller.about.namespace:
            raise Refused(f"the runtime has the pod in namespace {caller.about.namespace}, the API server in {metadata.namespace}")
        name = check_name("name", metadata.labels[SNAPSHOT])
        return await asyncio.to_thread(self._node.store.get, metadata.namespace, name, caller.annotation(DIGEST))

    async def _start_cold(self, caller: Caller, snapshot: Snapshot | None, reason: str, why: str, phases: Phases) -> None:
        """The container becomes what it would have been; an event says why."""
        pod, uid = caller.pod, caller.pod.metadata.uid
        _LOG.warning("pod %s is started cold (%s): %s", pod, reason, why)
        telling = asyncio.create_task(self._cluster.event(pod, "Warning", reason, why, "Restore"))
        container = caller.container
        try:
            command = await self._command(caller)
            with contextlib.suppress(Refused):
                metrics.started_cold(caller.model)
            container.take()
            self._containers[uid] = container
            caller.placeholder.become(command)
        except CriError as error:
            await self._cluster.event(pod, "Warning", reason, f"its own command cannot be started either: {error}", "Restore")
            caller.placeholder.exit(127)
            return
        finally:
            await telling
        await self._cluster.event(pod, "Normal", "ColdStarted", f"{' '.join(command)[:200]}: {why}", "Restore")
        try:
            record = caller.record(command, snapshot.manifest.engine if snapshot else None)
            engine = Engine(record, container, container.output(caller.model), 1)
            with phases.phase("health"):
                await engine.wait_healthy()
        except (Refused, EngineError) as error:
            _LOG.warning("pod %s takes no part in serving: %s", pod, error)
        else:
            self._has(pod, self._add(caller, None, Origin.COLD, engine, phases, why))

    async def _command(self, caller: Caller) -> tuple[str, ...]:
        """The container's own. Raises CriError."""
        own = caller.placeholder.command  # with the kubelet's variables in it
        if own and not caller.annotation(ENTRYPOINT):
            return own
        entrypoint, words = await self._cri.starts(caller.about.image)
        command = (*entrypoint, *(own or words))
        if not command:
            raise CriError(f"image {caller.about.image} names no command, and the pod none either")
        return command

    async def _capture(self, caller: Caller) -> None:
        pod, phases = caller.pod, Phases()
        if caller.annotation(CAPTURED) or caller.annotation(CAPTURE_FAILED):
            caller.placeholder.exit(0 if caller.annotation(CAPTURED) else 1)
            return
        name = pod.metadata.labels[CAPTURE]

        def progress(phase: str, done: int, total: int) -> None:
            if not done:
                _LOG.info("snapshot %s/%s of pod %s: %s", pod.metadata.namespace, name, pod, phase)

        try:
            _check_allowed(caller, self._folders)
            path, body = _canary(caller.annotation(CANARY))
            request = CaptureRequest(
                namespace=check_name("namespace", pod.metadata.namespace),
                name=check_name("name", name),
                model=caller.model,
                engine=caller.record(await self._command(caller)),
                canary_path=path,
                canary_body=body,
                replace=True,
            )
            captured = await self._node.capture(request, progress, phases, caller.container.open)
        except (Refused, CriError, *_CAPTURE_ERRORS) as error:
            if caller.placeholder.ended.done() and pod.metadata.uid not in self._cluster.pods:
                return  # it was deleted meanwhile
            _LOG.error("no snapshot %s/%s of pod %s: %s", pod.metadata.namespace, name, pod, error)
            await self._cluster.event(pod, "Warning", "CaptureFailed", str(error), "Capture")
            await self._annotate(pod, {CAPTURE_FAILED: str(error)[:2000]})
            code = 1
        else:
            manifest = captured.snapshot.manifest
            sizes = f"{manifest.image_bytes / 1e6:.0f} MB, of which CRIU restores {manifest.skeleton_bytes / 1e6:.1f} MB"
            await self._annotate(pod, {CAPTURED: captured.snapshot.digest})
            await self._cluster.event(pod, "Normal", "Captured", f"{captured.snapshot} in {phases.total:.1f} s: {sizes}", "Capture")
            code = 0
        if not caller.placeholder.ended.done():
            caller.placeholder.exit(code)
            await asyncio.wait([caller.placeholder.ended], timeout=_PAUSE_SECONDS)

    async def _annotate(self, pod: Pod, annotations: dict[str, str]) -> None:
        """Until it is written: the controller waits for it. A pod that is gone needs none."""
        pause = _PAUSE_SECONDS
        while True:
            try:
                await self._cluster.annotate(pod, annotations)
                return
            except ClusterError as error:
                if error.status in (404, 409, 422):
                    return
                _LOG.warning("pod %s is not annotated yet, again in %.0f s: %s", pod, pause, error)
            await asyncio.sleep(pause)
            pause = min(30.0, pause * 2)

    async def _adopt(self, caller: Caller) -> None:
        """An engine that another agent has restored."""
        snapshot: Snapshot | None = None
        with contextlib.suppress(Refused, InvalidName, NotFound, Corrupt):
            snapshot = await self._snapshot(caller)
        try:
            record = caller.record(caller.placeholder.command or ("restored",), snapshot.manifest.engine if snapshot else None)
        except Refused as error:
            _LOG.warning("pod %s takes no part in serving: %s", caller.pod, error)
            return
        self._take(caller, record, snapshot, Origin.RESTORED, caller.placeholder.engine)

    async def _adopt_cold(self) -> None:
        """Pods that another agent started cold: their placeholders are gone, so they do not call."""
        await asyncio.sleep(_CALL_SECONDS)
        for pod in list(self._cluster.pods.values()):
            if not pod.metadata.labels.get(SNAPSHOT) or pod.metadata.uid in self._served or pod.is_leaving:
                continue
            self._look_at(pod)

    def _look_at(self, pod: Pod) -> None:
        """One that runs its own command becomes a replica once it is healthy; again, when its container was started again."""
        for status in pod.status.container_statuses:
            running = status.name == _engine_container(pod) and "running" in status.state
            if running and self._started.get(pod.metadata.uid) != status.container_id:
                self._started[pod.metadata.uid] = status.container_id
                task = asyncio.create_task(self._adopt_started(pod, status.container_id), name=f"pod {pod} runs its own command")
                self._adopting.add(task)
                task.add_done_callback(self._adopting.discard)

    async def _adopt_started(self, pod: Pod, container_id: str) -> None:
        snapshot: Snapshot | None = None
        with contextlib.ExitStack() as unless_taken:
            try:
                about = await self._cri.describe(container_id.rpartition("/")[2])
                caller = Caller(Placeholder(None, about.pid), about, pod)
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

    def _take(self, caller: Caller, record: EngineRecord, snapshot: Snapshot | None, origin: Origin, pid: int) -> None:
        container = caller.container
        container.take()
        self._containers[caller.pod.metadata.uid] = container
        engine = Engine(record, container, container.output(caller.model), pid)
        replica = self._add(caller, snapshot, origin, engine, Phases(), "it runs, and was not restored by this agent")
        self._has(caller.pod, replica)
        _LOG.info("pod %s goes on as replica %s", caller.pod, replica.id)

    def _add(self, caller: Caller, snapshot: Snapshot | None, origin: Origin, engine: Engine, phases: Phases, detail: str) -> Replica:
        namespace = caller.pod.metadata.namespace
        return self._node.replicas.add(caller.model, snapshot, origin, engine, phases, detail=detail, namespace=namespace)

    def _has(self, pod: Pod, replica: Replica) -> None:
        self._replicas[pod.metadata.uid] = replica
        if (now := self._cluster.pods.get(pod.metadata.uid)) is None or now.is_leaving:
            self._node.replicas.retire(replica.id, "its pod is being deleted")

    def _changed(self, pod: Pod, gone: bool) -> None:
        """A pod that is being deleted gets no more requests, before its engine hears of it."""
        uid = pod.metadata.uid
        if (gone or pod.is_leaving) and (replica := self._replicas.get(uid)):
            self._node.replicas.retire(replica.id, "its pod is being deleted")
        if not gone and not pod.is_leaving and pod.metadata.labels.get(SNAPSHOT) and not self._has_placeholder(pod):
            self._look_at(pod)
        if gone:
            self._containers.pop(uid, None)
            self._started.pop(uid, None)
            self._replicas.pop(uid, None)
            self._served.discard(uid)
            self._restored.pop(uid, None)

    def _has_placeholder(self, pod: Pod) -> bool:
        """Whether it calls by itself."""
        return any(volume.host_path and Path(volume.host_path.path) == self._folders[0] for volume in pod.spec.volumes)


def _engine_container(pod: Pod) -> str:
    return pod.metadata.annotations.get(CONTAINER) or (pod.spec.containers[0].name if pod.spec.containers else "")


def _check_allowed(caller: Caller, folders: Sequence[Path]) -> None:
    """What the kernel shows of the container is checked when it is opened; this is what was asked for. Raises Refused."""
    spec = caller.pod.spec
    asked = [name for name, set_ in (("hostPID", spec.host_pid), ("hostIPC", spec.host_ipc), ("hostNetwork", spec.host_network)) if set_]
    if asked:
        raise Refused(f"the pod asks for {', '.join(asked)}; a snapshot is restored only into pods that are apart from the node")
    for volume in spec.volumes:
        path = Path(volume.host_path.path) if volume.host_path else None
        if path and (".." in path.parts or not any(path.is_relative_to(ours) for ours in folders)):
            raise Refused(f"volume {volume.name} of the pod is a folder of the node ({path}); use a volume of another kind")
    if caller.about.name != _engine_container(caller.pod):
        raise Refused(f"container {caller.about.name} is not the pod's engine, which is {_engine_container(caller.pod)}")


def _canary(text: str) -> tuple[str, str]:
    """Path and body. Raises Refused."""
    if not text:
        return "", ""
    try:
        found = json.loads(text)
        path, body = found["path"], found.get("body", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f'annotation {CANARY} is not {{"path": "/…", "body": …}}: {text[:100]}') from None
    if not isinstance(path, str) or not path.startswith("/"):
        raise Refused(f"annotation {CANARY}: the path {path!r} does not begin with /")
    return path, body if isinstance(body, str) else json.dumps(body)
