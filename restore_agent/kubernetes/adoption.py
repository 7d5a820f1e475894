"""Engines that run in pods of this node and that this agent did not restore: they become replicas all the same.

    a placeholder calls that has an engine: another agent restored it, before this one took its place       →  replica, at once
    a labelled pod without a placeholder (opted out, left alone, or made while no agent was there)           →  replica, once it is healthy

Which of the second kind there are is seen in the pods' status, again whenever a container was started anew. A status may say that a
container runs while its first process is still the runtime's, which becomes the placeholder a moment later: on a busy node that moment is
long. So for a capture pod, which would fail at once, what the container was made with is asked for, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from restore_agent.engine.engine import Engine, EngineError
from restore_agent.errors import AgentError
from restore_agent.kubernetes.calling_pod import CallingPod, Refused, engine_container
from restore_agent.kubernetes.cri import Cri, CriError, Described
from restore_agent.kubernetes.injection import has_placeholder, is_made_with_placeholder
from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod
from restore_agent.kubernetes.pod_captures import PodCaptures
from restore_agent.kubernetes.pod_gpus import PodGpus
from restore_agent.kubernetes.pod_replicas import PodReplicas
from restore_agent.places.container_error import ContainerError
from restore_agent.places.placeholder import Placeholder
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import Origin
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.manifest import EngineRecord, InvalidName
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unusable import Unusable
from zerowake_shared.background import ended, told
from zerowake_shared.backoff import Backoff
from zerowake_shared.pod_contract import CAPTURE, SNAPSHOT

_WHY = "it runs, and was not restored by this agent"
_BEGIN_SECONDS = 30.0  # in which a container's first process becomes the command that it was made with, on a node that has much to do
_FIRST_PAUSE, _LAST_PAUSE = 0.01, 1.0  # between two looks at it: the kernel tells nobody
_LOG = logging.getLogger("zerowake.agent")


class Adoption:
    """Looks for engines that run already. Use `async with adoption.following()`."""

    def __init__(self, store: Store, node_pods: NodePods, cri: Cri, gpus: PodGpus, replicas: PodReplicas, captures: PodCaptures) -> None:
        self._store = store
        self._node_pods = node_pods
        self._cri = cri
        self._gpus = gpus
        self._replicas = replicas
        self._captures = captures
        self._called: dict[str, str] = {}  # uid of a pod → its container whose placeholder has called
        self._seen: dict[str, str] = {}  # uid of a pod → its container that runs its own command, once looked at
        self._looking: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        self._node_pods.on_change(self._changed)
        try:
            yield
        finally:
            await ended(self._looking)

    def has_called(self, pod: Pod, container: str) -> None:
        """This container of the pod has a placeholder, and needs not be looked at."""
        self._called[pod.metadata.uid] = container

    async def adopt(self, caller: CallingPod) -> None:
        """An engine that another agent has restored: its placeholder calls again."""
        snapshot = await self._snapshot(caller)
        try:
            record = caller.record(caller.placeholder.command, snapshot.manifest.engine if snapshot else None)
            caller.container.gpus = await self._gpus.of(caller)
        except Refused as error:
            _takes_no_part(caller.pod, error)
            return
        if self._replicas.was_moving(caller):
            why = "an agent ended as it put the engine to sleep or woke it, and nobody knows how far it was: its container begins anew"
            await self._node_pods.event(caller.pod, "Warning", "WakeFailed", why, "Wake")
            caller.placeholder.exit(1)
            return
        try:
            await caller.container.take_over()
        except ContainerError as error:  # it may serve all the same
            _LOG.warning("pod %s: its engine cannot be told anything: %s", caller.pod, error)
            self._take(caller, record, snapshot, Origin.RESTORED, caller.placeholder.engine)
        else:
            self._take(caller, record, snapshot, Origin.RESTORED, caller.placeholder.engine).taken_over()

    def _changed(self, pod: Pod, gone: bool) -> None:
        if gone:
            self._called.pop(pod.metadata.uid, None)
            self._seen.pop(pod.metadata.uid, None)
        elif not pod.is_leaving and not {SNAPSHOT, CAPTURE}.isdisjoint(pod.metadata.labels):
            self._look_at(pod)

    def _look_at(self, pod: Pod) -> None:
        uid = pod.metadata.uid
        for status in pod.status.container_statuses:
            if status.name != engine_container(pod) or "running" not in status.state:
                continue
            container = status.container_id.rpartition("/")[2]
            if container not in (self._called.get(uid), self._seen.get(uid)):
                self._seen[uid] = container
                task = asyncio.create_task(self._look(pod, container), name=f"pod {pod} runs its own command")
                self._looking.add(task)
                task.add_done_callback(self._looking.discard)
                told(task, _LOG)

    async def _look(self, pod: Pod, container: str) -> None:
        """A container that runs its own command is a replica once it is healthy."""
        with contextlib.ExitStack() as unless_taken:
            try:
                about = await self._cri.describe(container)
                if has_placeholder(about.pid):
                    return  # it calls
                if pod.metadata.labels.get(CAPTURE):
                    if not await self._begins_as_placeholder(pod, about):
                        await self._captures.missed(pod)
                    return
                caller = CallingPod(Placeholder(None, about.pid), about, pod)
                unless_taken.callback(caller.placeholder.close)
                snapshot = await self._snapshot(caller)
                record = caller.record(("started",), snapshot.manifest.engine if snapshot else None)
                await Engine(record, caller.container, caller.container.output(caller.model), 1).wait_healthy()
            except (CriError, Refused, EngineError, OSError) as error:
                _takes_no_part(pod, error)
                if not isinstance(error, Refused) and self._seen.get(pod.metadata.uid) == container:
                    del self._seen[pod.metadata.uid]  # it is looked at again with the next word of the pod
            else:
                if self._called.get(pod.metadata.uid) == container:
                    return  # its placeholder called meanwhile, and became this command: whoever answered the call has it
                unless_taken.pop_all()
                self._take(caller, record, None, Origin.COLD, 1)

    async def _begins_as_placeholder(self, pod: Pod, about: Described) -> bool:
        """Whether it calls, once the runtime has started it. One that waited in vain for an agent has become its command, and does not.

        Raises OSError: it has ended.
        """
        if not is_made_with_placeholder(about.command):
            return False
        backoff = Backoff(_FIRST_PAUSE, _LAST_PAUSE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEGIN_SECONDS):
                while True:
                    if self._called.get(pod.metadata.uid) == about.id or has_placeholder(about.pid):
                        return True
                    await asyncio.sleep(backoff.next())
        return False

    async def _snapshot(self, caller: CallingPod) -> Snapshot | None:
        """For how its engine is reached; None: it has none, or one that cannot be used."""
        try:
            return await caller.snapshot(self._store)
        except (Refused, InvalidName, NotFound, Unusable):
            return None

    def _take(self, caller: CallingPod, record: EngineRecord, snapshot: Snapshot | None, origin: Origin, pid: int) -> Engine:
        container = caller.container
        container.unanswerable = caller.unanswerable(record.port)
        container.take()
        self._replicas.hold(caller.pod, container)
        engine = Engine(record, container, container.output(caller.model), pid)
        replica = self._replicas.started(caller, snapshot, origin, engine, Phases(), _WHY)
        _LOG.info("pod %s goes on as replica %s", caller.pod, replica.id)
        return engine


def _takes_no_part(pod: Pod, error: AgentError | OSError) -> None:
    _LOG.warning("pod %s takes no part in serving: %s", pod, error)
