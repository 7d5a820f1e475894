"""A pod, as far as the agent reads it.

What its fields say decides over rights on this node, so they are taken from the API server, never from whoever asks for them.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Metadata(msgspec.Struct, rename="camel"):
    """Who a pod is, and what is told of it."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deletion_timestamp: str = ""
    deletion_grace_period_seconds: float | None = None


class VolumeMount(msgspec.Struct, rename="camel"):
    """A volume in a container, at a path."""

    name: str
    mount_path: str


class ContainerPort(msgspec.Struct, rename="camel"):
    """A port that a container says it listens on."""

    container_port: int
    name: str = ""


class HttpGet(msgspec.Struct):
    """A request of a probe."""

    port: int | str = 0  # a number, or a port's name
    path: str = "/"
    scheme: str = "HTTP"


class ProbedPort(msgspec.Struct):
    """Where a probe of another kind asks."""

    port: int | str = 0


class Probe(msgspec.Struct, rename="camel"):
    """How the kubelet finds out how a container is; a command of the container asks where it likes."""

    http_get: HttpGet | None = None
    tcp_socket: ProbedPort | None = None
    grpc: ProbedPort | None = None


class Resources(msgspec.Struct):
    """What a container may use at most, where extended resources have a domain in their name; and its claims (DRA)."""

    limits: dict[str, str | int] = {}
    claims: list[dict[str, Any]] = []


class PodContainer(msgspec.Struct, rename="camel"):
    """A container as the pod wants it."""

    name: str
    ports: list[ContainerPort] = []
    volume_mounts: list[VolumeMount] = []
    command: list[str] = []
    args: list[str] = []
    env: list[dict[str, Any]] = []
    env_from: list[dict[str, Any]] = []
    resources: Resources = msgspec.field(default_factory=Resources)
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None


class HostPath(msgspec.Struct):
    """A folder of the node."""

    path: str


class Volume(msgspec.Struct, rename="camel"):
    """A volume, of one of the two kinds that matter here, or of another."""

    name: str
    host_path: HostPath | None = None
    empty_dir: dict[str, Any] | None = None


class Spec(msgspec.Struct, rename="camel"):
    """What the pod's owner wants."""

    containers: list[PodContainer] = []
    init_containers: list[PodContainer] = []
    volumes: list[Volume] = []
    host_users: bool | None = None
    termination_grace_period_seconds: float = 30.0
    host_network: bool = False
    # The API's spelling, which no rule gives.
    host_pid: bool = msgspec.field(default=False, name="hostPID")
    host_ipc: bool = msgspec.field(default=False, name="hostIPC")


class ContainerStatus(msgspec.Struct, rename="camel"):
    """A container as the kubelet has it."""

    name: str
    container_id: str = msgspec.field(default="", name="containerID")  # of the runtime, after its scheme
    state: dict[str, Any] = {}  # one key: waiting, running, terminated


class Status(msgspec.Struct, rename="camel"):
    """What has become of it."""

    phase: str = ""
    container_statuses: list[ContainerStatus] = []


class Pod(msgspec.Struct):
    """Metadata, what is wanted, and what is."""

    metadata: Metadata
    spec: Spec = msgspec.field(default_factory=Spec)
    status: Status = msgspec.field(default_factory=Status)

    def __str__(self) -> str:
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def is_leaving(self) -> bool:
        return bool(self.metadata.deletion_timestamp) or self.status.phase in ("Succeeded", "Failed")
