"""A pod whose engine is restored instead of started: what is changed in it, and which pods are left as they are.

Its owner's words stay: command, environment and volumes are untouched. What is added tells the agent which snapshot is meant, and leads it
to the nodes that are soonest. On the node, the agent puts a placeholder before the container's command as that is made, and gives it a
seccomp policy; where no agent is, the container starts as it always did.

A snapshot stands for one image, command, arguments and environment: a pod that says anything else asks for another engine, and starts as
it would have. Nodes are preferred, never required, but for the label that the agents' own DaemonSet selects by. Rejected: the placeholder
as the pod's own command, in a volume of the node's (the kubelet takes a third of a second for any volume, most tenants may have none of
that kind, and without an agent the pod could not start at all); an init container that brings it (half a second in every start); and a
required list of node names (a cluster autoscaler can't add a node to it).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaler.kubernetes.resources import ModelSnapshot
from scaler.plan.actions import Prefer
from zerowake_shared import pod_contract

_PREFERRED_NODES = 20
_OURS = (f"{pod_contract.ZEROWAKE_FOLDER}/", f"{pod_contract.GPUMEM_FOLDER}/")
_POWERS = {"ALL", *pod_contract.FORBIDDEN_CAPABILITIES}


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """What the agents' DaemonSet brings: the labels of the nodes it runs on, and whether gpumem runs beside it."""

    selector: Mapping[str, str] = field(default_factory=dict)
    gpumem: bool = False


class Patch:
    """A JSON patch (RFC 6902) that is applied to `target` while it is written, so that later steps see earlier ones."""

    def __init__(self, target: dict[str, Any]) -> None:
        self.target = target
        self.operations: list[dict[str, Any]] = []

    def put(self, value: Any, *path: str | int) -> None:
        """Sets the value; objects that are missing on the way are made."""
        node: Any = self.target
        for depth, part in enumerate(path[:-1]):
            below = node[part] if isinstance(part, int) else node.get(part)
            if below is None:
                for name in reversed(path[depth + 1 :]):
                    value = {name: value}
                path = path[: depth + 1]
                break
            node = below
        self._write("replace" if isinstance(path[-1], int) else "add", path, value)  # "add" at an index would push the rest on
        node[path[-1]] = value

    def append(self, value: Any, *path: str | int) -> None:
        """Adds to the list, which is made if it is missing."""
        node: Any = self.target
        for part in path:
            node = node[part] if isinstance(part, int) else (node or {}).get(part)
        if node is None:
            self.put([value], *path)
        else:
            self._write("add", (*path, "-"), value)
            node.append(value)

    def drop(self, *path: str | int) -> None:
        """Removes the value if there is one."""
        node: Any = self.target
        for part in path[:-1]:
            node = node[part] if isinstance(part, int) else (node or {}).get(part)
        if node is not None and path[-1] in node:
            self._write("remove", path)
            del node[path[-1]]

    def _write(self, kind: str, path: tuple[str | int, ...], *value: Any) -> None:
        pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
        # A copy: what is put into the value later is an operation of its own.
        self.operations.append({"op": kind, "path": pointer, **({"value": copy.deepcopy(value[0])} if value else {})})


def engine_of(spec: Mapping[str, Any], snapshot: ModelSnapshot) -> int | None:
    """The index of the engine's container; None: there is none of the name that the snapshot wants."""
    containers: list[dict[str, Any]] = spec.get("containers") or []
    if not snapshot.spec.container:
        return 0 if containers else None
    return next((index for index, each in enumerate(containers) if each.get("name") == snapshot.spec.container), None)


def unfit(spec: Mapping[str, Any], snapshot: ModelSnapshot, setup: NodeSetup) -> str:
    """Why this pod is left as it is; empty: its engine can be restored."""
    index = engine_of(spec, snapshot)
    if index is None:
        return f"it has no container {snapshot.spec.container!r}"
    if reason := refused(spec, index) or _taken(spec, index):
        return reason
    wanted = spec.get("nodeSelector") or {}
    if spec.get("nodeName") or any(wanted.get(key, value) != value for key, value in setup.selector.items()):
        return "it names nodes itself, where no agent may be"
    template = (snapshot.spec.template or {}).get("spec") or {}
    captured = engine_of(template, snapshot)
    if captured is not None and (differs := difference(template["containers"][captured], spec["containers"][index])):
        name = spec["containers"][index].get("name")
        return (
            f"{differs} of container {name!r} is not the snapshot's; give spec.template of the ModelSnapshot the same: it is captured anew"
        )
    return ""


def _uncapturable(spec: Mapping[str, Any], index: int) -> str:
    """What the agent would refuse to restore into this container for; empty: nothing."""
    if spec.get("shareProcessNamespace"):
        return "its containers share their processes, so the engine's process numbers are not free"
    if spec.get("hostUsers") is False:
        return "it has a user namespace (hostUsers: false)"
    container = spec["containers"][index]
    if container.get("tty"):
        return f"container {container.get('name')!r} has a terminal (tty)"
    added = set(((container.get("securityContext") or {}).get("capabilities") or {}).get("add") or [])
    if powers := sorted(added & _POWERS):
        return f"container {container.get('name')!r} has capabilities that reach beyond it: {', '.join(powers)}"
    return ""


def _taken(spec: Mapping[str, Any], index: int) -> str:
    """What the container has where the agent puts something; empty: nothing."""
    for mount in spec["containers"][index].get("volumeMounts") or []:
        if f"{mount.get('mountPath', '')}/".startswith(_OURS):
            return f"its container mounts something at {mount['mountPath']} already"
    return ""


def refused(spec: Mapping[str, Any], index: int) -> str:
    """Why no snapshot is taken of this container or restored into it, whatever else is so; empty: it can be."""
    return _host_access(spec) or _uncapturable(spec, index)


def _host_access(spec: Mapping[str, Any]) -> str:
    """What of the host the pod asks for, which no snapshot is taken with or restored into; empty: nothing."""
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            return f"{name} is asked for"
    for volume in spec.get("volumes") or []:
        if volume.get("hostPath") is not None:
            return f"volume {volume.get('name')!r} is a hostPath"
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        if (container.get("securityContext") or {}).get("privileged"):
            return f"container {container.get('name')!r} is privileged"
    return ""


def difference(captured: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What of the engine that was captured the other container has otherwise; empty: nothing that is known before it runs."""
    for name in ("image", "command", "args", "workingDir"):
        if (captured.get(name) or None) != (asked.get(name) or None):
            return name
    return next(iter(_literals(captured) ^ _literals(asked)), ("", ""))[0] and "the environment"


def _literals(container: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(each["name"], each.get("value") or "") for each in container.get("env") or [] if "valueFrom" not in each}


def prepare(pod: Patch, snapshot: ModelSnapshot, setup: NodeSetup, nodes: Prefer, digest: str = "") -> None:
    """Marks the engine's container of `pod` for the agent. `nodes`: the plan's preference; `digest`: what to restore."""
    spec = pod.target["spec"]
    index = engine_of(spec, snapshot)
    assert index is not None
    container = spec["containers"][index]
    resources = container.get("resources") or {}
    # A claim may be of anything; gpumem's socket harms no engine that has no GPU.
    on_gpu = bool(resources.get("claims")) or any(name.startswith("nvidia.com/gpu") for name in resources.get("limits") or {})
    of_template = ((snapshot.spec.template or {}).get("metadata") or {}).get("annotations") or {}
    never = of_template.get(pod_contract.GPUMEM) == "false"
    annotations = {
        pod_contract.CONTAINER: container["name"],
        pod_contract.PORT: str(snapshot.spec.port),
        pod_contract.HEALTH: snapshot.spec.health_path,
        pod_contract.MODEL: snapshot.model,
        pod_contract.DIGEST: digest,
        pod_contract.COLD: "",
        pod_contract.STALE_ENVIRONMENT: snapshot.spec.stale_environment,
        pod_contract.SECCOMP: "own" if _has_own_seccomp(container, spec) else "",
        pod_contract.GPUMEM: "false" if never else "true" if setup.gpumem and on_gpu else "",
    }
    for name, value in annotations.items():
        if value:
            pod.put(value, "metadata", "annotations", name)
        else:
            pod.drop("metadata", "annotations", name)
    for key, value in setup.selector.items():
        pod.put(value, "spec", "nodeSelector", key)
    preferred = ("spec", "affinity", "nodeAffinity", "preferredDuringSchedulingIgnoredDuringExecution")
    for node, weight in _weights(nodes.seconds).items():
        pod.append({"weight": weight, "preference": {"matchFields": [_named("In", node)]}}, *preferred)
    if nodes.avoid:
        others = {"matchFields": [_named("NotIn", node) for node in nodes.avoid[:_PREFERRED_NODES]]}
        pod.append({"weight": 100, "preference": others}, *preferred)


def _has_own_seccomp(container: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    """Whether its user chose a profile. That is theirs: it may allow less than the agent's."""
    chosen = [(each.get("securityContext") or {}).get("seccompProfile") or {} for each in (container, spec)]
    return next((each["type"] for each in chosen if "type" in each), "RuntimeDefault") != "RuntimeDefault"


def _named(operator: str, node: str) -> dict[str, Any]:
    return {"key": "metadata.name", "operator": operator, "values": [node]}


def _weights(seconds: Mapping[str, float]) -> dict[str, int]:
    """Kubernetes' weights, 1 to 100, the sooner the higher; of the best nodes."""
    best = sorted(seconds, key=lambda node: seconds[node])[:_PREFERRED_NODES]
    return {node: max(1, round(100 * seconds[best[0]] / seconds[node])) if seconds[node] else 100 for node in best}
