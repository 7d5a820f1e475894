"""A placeholder that has called, and what its pod asks for: by its labels and annotations, and whether it may have it."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import dataclass

from pydantic import ValidationError

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.kubernetes.cri import Described
from restore_agent.kubernetes.pod import Pod, PodContainer, Probe
from restore_agent.places.container import Container
from restore_agent.places.placeholder import Placeholder
from restore_agent.snapshots.catalog import Catalog, Snapshot
from restore_agent.snapshots.manifest import EngineRecord, check_name
from zerowake_shared import pod_environment
from zerowake_shared.json_text import parsed
from zerowake_shared.pod_contract import (
    CANARY,
    CAPTURE,
    CONTAINER,
    DIGEST,
    GROUP,
    HEALTH,
    MODEL,
    NAMES,
    PORT,
    SNAPSHOT,
    STALE_ENVIRONMENT,
    is_lent_to,
    replica_id,
)


class Refused(AgentError):
    """A pod asks for what it may not have."""

    kind = ErrorKind.INVALID
    reason = "refused"


@dataclass(frozen=True)
class CallingPod:
    """A placeholder, and all that is known of it."""

    placeholder: Placeholder
    about: Described
    pod: Pod

    @functools.cached_property
    def container(self) -> Container:
        spec, name = self.pod.spec, self.about.name
        volatile = {volume.name for volume in spec.volumes if volume.empty_dir is not None}
        mounts = {each.name: [mount for mount in each.volume_mounts if mount.name in volatile] for each in spec.containers}
        others = [*spec.init_containers, *(each for each in spec.containers if each.name != name)]
        theirs = {mount.name for each in others for mount in each.volume_mounts}
        paths = [mount.mount_path for mount in mounts.get(name, ())]
        shared = [mount.mount_path for mount in mounts.get(name, ()) if mount.name in theirs]
        own = next((each for each in spec.containers if each.name == name), PodContainer(name))
        asked = {"command": own.command, "args": own.args, "env": own.env, "envFrom": own.env_from}
        allowed = self.annotation(STALE_ENVIRONMENT) == pod_environment.ALLOWED
        made = Container(self.placeholder, self.about.image, self.about.addresses, paths, shared, asked=asked, stale_allowed=allowed)
        made.grace = spec.termination_grace_period_seconds
        made.probed = frozenset(probe.http_get.path or "/" for probe in _probes(own).values() if probe.http_get)
        return made

    def unanswerable(self, port: int) -> str:
        """Why its probes would find an engine that sleeps dead, though others answer at its port; empty: they do not."""
        own = next((each for each in self.pod.spec.containers if each.name == self.about.name), PodContainer(self.about.name))
        for name, probe in _probes(own).items():
            asks = probe.http_get or probe.tcp_socket or probe.grpc
            if probe.grpc or (probe.http_get and probe.http_get.scheme == "HTTPS"):
                return f"its {name} asks by {'gRPC' if probe.grpc else 'HTTPS'}, which nobody can answer for it; use httpGet or tcpSocket"
            named = {each.name: each.container_port for each in own.ports if each.name}
            if asks and named.get(str(asks.port), asks.port) != port:
                return f"its {name} asks at port {asks.port}, and its engine's is {port}: nobody answers there while it stands still"
        return ""

    @property
    def model(self) -> str:
        return self.annotation(MODEL) or self.pod.metadata.labels.get(SNAPSHOT) or self.pod.metadata.labels.get(CAPTURE, "")

    @property
    def replica_id(self) -> str:
        """Of the engine in its container."""
        return replica_id(self.pod.metadata.name, self.about.id)

    @property
    def is_lent_to(self) -> bool:
        """Whether gpumem lends to it."""
        return is_lent_to(self.pod.metadata.annotations)

    def annotation(self, key: str) -> str:
        return self.pod.metadata.annotations.get(key, "")

    async def snapshot(self, store: Catalog) -> Snapshot:
        """The one that its label names, in its own namespace. Raises Refused, InvalidName, NotFound, Corrupt, Untrusted."""
        metadata = self.pod.metadata
        if not metadata.labels.get(SNAPSHOT):
            raise Refused(f"the pod has no label {SNAPSHOT}")
        if metadata.namespace != self.about.namespace:
            raise Refused(f"the runtime has the pod in namespace {self.about.namespace}, the API server in {metadata.namespace}")
        name = check_name("name", metadata.labels[SNAPSHOT])
        return await asyncio.to_thread(store.get, metadata.namespace, name, self.annotation(DIGEST))

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
            raise Refused(f"annotation {GROUP}/{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def check_allowed(self) -> None:
        """What the kernel shows of the container is checked when it is opened; this is what was asked for. Raises Refused."""
        spec = self.pod.spec
        asked = [
            name for name, set_ in (("hostPID", spec.host_pid), ("hostIPC", spec.host_ipc), ("hostNetwork", spec.host_network)) if set_
        ]
        if asked:
            raise Refused(f"the pod asks for {', '.join(asked)}; a snapshot is restored only into pods that are apart from the node")
        for volume in spec.volumes:
            if volume.host_path:
                raise Refused(
                    f"volume {volume.name} of the pod is a folder of the node ({volume.host_path.path}); use a volume of another kind"
                )
        if self.about.name != engine_container(self.pod):
            raise Refused(f"container {self.about.name} is not the pod's engine, which is {engine_container(self.pod)}")

    def canary(self) -> tuple[str, str]:
        """Path and body; empty: none is asked for. Raises Refused."""
        text = self.annotation(CANARY)
        if not text:
            return "", ""
        try:
            found = parsed(text)
            path, body = found["path"], found.get("body", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Refused(f'annotation {CANARY} is not {{"path": "/…", "body": …}}: {text[:100]}') from None
        if not isinstance(path, str) or not path.startswith("/"):
            raise Refused(f"annotation {CANARY}: the path {path!r} does not begin with /")
        return path, body if isinstance(body, str) else json.dumps(body)

    def names(self) -> tuple[str, ...]:
        """What else the engine answers to. Raises Refused."""
        text = self.annotation(NAMES)
        try:
            found = parsed(text) if text else []
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
            raise Refused(f"annotation {NAMES} is no list of names: {text[:100]}")
        return tuple(found)


def _probes(container: PodContainer) -> dict[str, Probe]:
    """Those that go on as long as it runs, by their names in the pod."""
    found = {"readinessProbe": container.readiness_probe, "livenessProbe": container.liveness_probe}
    return {name: probe for name, probe in found.items() if probe}


def engine_container(pod: Pod) -> str:
    return pod.metadata.annotations.get(CONTAINER) or (pod.spec.containers[0].name if pod.spec.containers else "")
