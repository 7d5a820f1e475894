"""A pod with an engine in it, as Kubernetes describes it, as far as it is read."""

from __future__ import annotations

import msgspec

from scaler.kubernetes.resources import Condition, Metadata


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    """A part of an object, under the API's names."""


class ContainerPort(_Part, frozen=True):
    """A port that a container says it listens on."""

    container_port: int
    name: str = ""


class ProbeTarget(_Part, frozen=True):
    """Where a probe asks; the port is a number, or a port's name."""

    port: int | str = 0


class Probe(_Part, frozen=True):
    """How the kubelet finds out; a command has no port."""

    http_get: ProbeTarget | None = None
    tcp_socket: ProbeTarget | None = None
    grpc: ProbeTarget | None = None


class EngineContainer(_Part, frozen=True):
    """A container as the pod wants it."""

    name: str
    ports: tuple[ContainerPort, ...] = ()
    readiness_probe: Probe | None = None
    startup_probe: Probe | None = None

    @property
    def probe(self) -> Probe | None:
        return self.readiness_probe or self.startup_probe

    @property
    def port(self) -> int:
        """Where it listens, by what its owner says; 0: nothing says so."""
        probe = self.probe
        target = (probe.http_get or probe.tcp_socket or probe.grpc) if probe else None
        if target is not None and isinstance(target.port, int):
            return target.port
        named = next((each for each in self.ports if target is not None and each.name == target.port), None)
        return (named or self.ports[0]).container_port if self.ports else 0


class EnginePodSpec(_Part, frozen=True):
    """What the pod's owner wants."""

    node_name: str = ""
    containers: tuple[EngineContainer, ...] = ()


class Running(_Part, frozen=True):
    """A container that runs."""

    started_at: str = ""


class Waiting(_Part, frozen=True):
    """A container that does not run yet, or not again."""

    reason: str = ""
    message: str = ""


class Ended(_Part, frozen=True):
    """A container's end."""

    exit_code: int = 0
    reason: str = ""


class EngineState(_Part, frozen=True):
    """What a container does: one of the three."""

    running: Running | None = None
    waiting: Waiting | None = None
    terminated: Ended | None = None


class EngineStatus(_Part, frozen=True):
    """A container as the kubelet has it."""

    name: str
    container_id: str = msgspec.field(default="", name="containerID")
    state: EngineState = EngineState()
    last_state: EngineState = EngineState()


class EnginePodStatus(_Part, frozen=True):
    """How far a pod is, and why it is no further."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: tuple[Condition, ...] = ()
    init_container_statuses: tuple[EngineStatus, ...] = ()
    container_statuses: tuple[EngineStatus, ...] = ()


class EnginePod(_Part, frozen=True):
    """What is read of a pod with an engine."""

    metadata: Metadata
    spec: EnginePodSpec = EnginePodSpec()
    status: EnginePodStatus = EnginePodStatus()

    @property
    def is_ready(self) -> bool:
        return any(each.type == "Ready" and each.status == "True" for each in self.status.conditions)

    @property
    def is_on_a_node(self) -> bool:
        """It has one, and neither leaves nor has ended."""
        return bool(self.spec.node_name) and not self.metadata.deletion_timestamp and self.status.phase not in ("Succeeded", "Failed")
