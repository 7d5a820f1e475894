"""Pods that serve a model, by their own readiness: what Kubernetes says of every pod with the label `zerowake.dev/snapshot`.

Agents say it sooner and say more, but a node may have none: it cannot start there, it crashed, it was not scheduled, or none was installed.
So every labelled pod is followed, and fleet/readiness.py joins the two. A pod is ready as its condition `Ready` says, as for a Service.
Where its engine has no probe, `Ready` means no more than that a process runs (a placeholder, maybe): then the health that the ModelSnapshot
names is asked for until it answers, once; without a ModelSnapshot, until the port is open.

How the engine is reached is what an agent would find: the webhook's annotations, else the ModelSnapshot, else the engine's probe or its
first port. Whose pods may serve a model is the same, too: those of the namespace that has its name.
Rejected: EndpointSlices of a Service (nobody needs one for an engine, and they do not say when a container was started anew).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import aiohttp

from scaler.fleet.readiness import PodWord, Readiness
from scaler.gateway.dispatcher import Backend, Endpoint
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.engine_pod import EngineContainer, EnginePod
from scaler.kubernetes.resources import ModelSnapshot
from zerowake_shared import pod_contract
from zerowake_shared.background import ended, kept
from zerowake_shared.backoff import Backoff

log = logging.getLogger(__name__)

_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS, _ANSWER_SECONDS = 0.1, 1.0, 5.0


class Snapshots(Protocol):
    """An Informer of ModelSnapshots."""

    def get(self, namespace: str, name: str) -> ModelSnapshot | None: ...
    def on_change(self, callback: Callable[[ModelSnapshot | None, ModelSnapshot | None], None]) -> None: ...


class Pods(Protocol):
    """An Informer of pods with the label."""

    def __iter__(self) -> Any: ...
    def on_change(self, callback: Callable[[EnginePod | None, EnginePod | None], None]) -> None: ...


class EnginePods:
    """Tells `readiness` of the pods. Use `async with pods.following(informer)`."""

    def __init__(self, readiness: Readiness, models: Models, snapshots: Snapshots) -> None:
        self._readiness = readiness
        self._models = models
        self._snapshots = snapshots
        self._replicas: dict[str, str] = {}  # uid of a pod → the replica that its engine's container is
        self._healthy: set[str] = set()  # replicas without a probe that have answered
        self._looks: dict[str, asyncio.Task[None]] = {}  # for those that have not
        self._pods: Pods | None = None

    @contextlib.asynccontextmanager
    async def following(self, pods: Pods) -> AsyncIterator[None]:
        """Follows the pods until the block ends. `pods`: the informer of those with the label; it need not have synced."""
        self._pods = pods
        pods.on_change(self._changed)
        self._snapshots.on_change(self._snapshot_changed)
        self._models.on_owner(self._owner_changed)
        try:
            yield
        finally:
            self._pods = None
            await ended(self._looks.values())

    def of_model(self, model: str) -> list[EnginePod]:
        """The pods that may serve the model, ready or not."""
        return [pod for pod in self._pods or () if self.model_of(pod) == model]

    def model_of(self, pod: EnginePod) -> str:
        """The model that the pod may serve; empty: none."""
        if pod_contract.CAPTURE in pod.metadata.labels:
            return ""
        model = self._model(pod)
        return model if self._models.owner(model) == pod.metadata.namespace else ""

    def _snapshot_changed(self, old: ModelSnapshot | None, new: ModelSnapshot | None) -> None:
        changed = new or old
        if changed is not None:
            self._again(lambda pod: (pod.metadata.namespace, pod.metadata.labels.get(pod_contract.SNAPSHOT)) == changed.key)

    def _owner_changed(self, model: str) -> None:
        self._again(lambda pod: self._model(pod) == model)

    def _again(self, concerns: Callable[[EnginePod], bool]) -> None:
        for pod in list(self._pods or ()):
            if concerns(pod):
                self._changed(pod, pod)

    def _changed(self, old: EnginePod | None, new: EnginePod | None) -> None:
        if old is not None and (new is None or new.metadata.uid != old.metadata.uid):
            self._no_replica(old.metadata.uid)
        if new is None or pod_contract.CAPTURE in new.metadata.labels:
            return
        uid = new.metadata.uid
        found = self._replica(new)
        if found is None or found[0].id != self._replicas.get(uid):
            self._no_replica(uid, lives=_runs(new, self._replicas.get(uid, "")))
        if found is not None:
            backend, word = found
            self._replicas[uid] = backend.id
            self._readiness.pod_is(backend, word)

    def _no_replica(self, uid: str, *, lives: bool = False) -> None:
        """The pod's container that was known is there no more. lives: it is, and serves the model no more."""
        replica = self._replicas.pop(uid, None)
        if replica is None:
            return
        self._healthy.discard(replica)
        if look := self._looks.pop(replica, None):
            look.cancel()
        if lives:
            self._readiness.pod_silent(replica)
        else:
            self._readiness.pod_gone(replica)

    def _replica(self, pod: EnginePod) -> tuple[Backend, PodWord] | None:
        """The replica that its engine is, and what the pod's status says of it; None: there is none."""
        engine = self._engine(pod)
        model = self._model(pod)
        if engine is None or not pod.status.pod_ip or self._models.owner(model) != pod.metadata.namespace:
            return None
        status = next((each for each in pod.status.container_statuses if each.name == engine.name), None)
        if status is None or status.state.running is None or not status.container_id:
            return None
        port = self._port(pod, engine)
        if not port:
            log.warning("pod %s/%s gets no requests unless an agent speaks for it: nothing says at which port", *_key(pod))
            return None
        name = pod_contract.replica_id(pod.metadata.name, status.container_id)
        backend = Backend(name, model, Endpoint(pod.status.pod_ip, port), pod.spec.node_name)
        word = _word(pod, status.state.running.started_at)
        if word is PodWord.READY and engine.probe is None and name not in self._healthy and not self._readiness.named_by_agent(name):
            self._look_at(pod, backend)
            word = PodWord.STARTING
        return backend, word

    def _engine(self, pod: EnginePod) -> EngineContainer | None:
        snapshot = self._snapshot(pod)
        name = pod.metadata.annotations.get(pod_contract.CONTAINER) or (snapshot.spec.container if snapshot else "")
        return next((each for each in pod.spec.containers if name in ("", each.name)), None)

    def _model(self, pod: EnginePod) -> str:
        snapshot = self._snapshot(pod)
        known = pod.metadata.annotations.get(pod_contract.MODEL) or (snapshot.model if snapshot else "")
        return known or pod.metadata.labels.get(pod_contract.SNAPSHOT, "")

    def _port(self, pod: EnginePod, engine: EngineContainer) -> int:
        marked = pod.metadata.annotations.get(pod_contract.PORT, "")
        if marked.isdecimal():
            return int(marked)
        snapshot = self._snapshot(pod)
        return snapshot.spec.port if snapshot else engine.port

    def _snapshot(self, pod: EnginePod) -> ModelSnapshot | None:
        return self._snapshots.get(pod.metadata.namespace, pod.metadata.labels.get(pod_contract.SNAPSHOT, ""))

    # --- engines without a probe

    def _look_at(self, pod: EnginePod, backend: Backend) -> None:
        if backend.id in self._looks:
            return
        snapshot = self._snapshot(pod)
        path = pod.metadata.annotations.get(pod_contract.HEALTH) or (snapshot.spec.health_path if snapshot else "")
        look, name = functools.partial(self._look, pod, backend, path), f"health of {backend.id}"
        self._looks[backend.id] = asyncio.create_task(kept(look, name, log), name=name)

    async def _look(self, pod: EnginePod, backend: Backend, path: str) -> None:
        backoff = Backoff(_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS)
        while True:
            if await _answers(backend.endpoint, path):
                break
            await asyncio.sleep(backoff.next())
        self._healthy.add(backend.id)
        del self._looks[backend.id]
        self._again(lambda each: each.metadata.uid == pod.metadata.uid)


def _runs(pod: EnginePod, replica: str) -> bool:
    """Whether the container that is this replica runs in the pod."""
    name, running = pod.metadata.name, [each for each in pod.status.container_statuses if each.state.running is not None]
    return any(pod_contract.replica_id(name, each.container_id) == replica for each in running)


def _word(pod: EnginePod, started_at: str) -> PodWord:
    if pod.metadata.deletion_timestamp:
        return PodWord.LEAVING
    ready = next((each for each in pod.status.conditions if each.type == "Ready"), None)
    if ready is None:
        return PodWord.STARTING
    if ready.status == "True":
        return PodWord.READY
    # Before its first time it has not been ready since before the container started.
    return PodWord.UNREADY if ready.last_transition_time > started_at else PodWord.STARTING


def _key(pod: EnginePod) -> tuple[str, str]:
    return pod.metadata.namespace, pod.metadata.name


async def _answers(endpoint: Endpoint, path: str) -> bool:
    """Whether the engine says that it is healthy; without a path: whether its port is open."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            if not path:
                _, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
                writer.close()
                return True
            host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
            url = f"http://{host}:{endpoint.port}/{path.lstrip('/')}"
            async with aiohttp.ClientSession() as session, session.get(url, allow_redirects=False) as answer:
                return answer.status < 400
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False
