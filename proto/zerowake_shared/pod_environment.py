"""Which variables of a container's environment are its pod's own, and what became of them in another pod.

A restored process keeps the environment of the pod that it was captured in. Kubernetes writes into it, by value or by reference: fields of
the pod and of its resources, contents of ConfigMaps and Secrets, the addresses of the namespace's Services, the host name, and whatever of
these `$(NAME)` has put into another variable or an argument. So a variable that has another value in the next pod is one of three:

    implicit   nobody asked for it (HOSTNAME, addresses of Services, what a device plugin sets): engines live with old values of these
    own        the pod's owner asked for a field of the pod or of its resources: an old value is a wrong one, unless the owner allows it
    content    a literal, or of a ConfigMap or a Secret: another engine is meant

The scaler judges a template before it is captured; the agent compares what two containers really had. Containers are as the API has them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zerowake_shared.pod_contract import ZEROWAKE_FOLDER

ALLOWED = "allowed"  # spec.staleEnvironment: own variables may be old ones
_OURS = frozenset({"SNAPSHOT_CONTROL_DIR", "GPUMEM_SOCKET"})
_PYTHON_PATH = "PYTHONPATH"  # to which the agent adds a folder
_EACH_POD = {"metadata.name", "metadata.uid", "status.podIP", "status.podIPs"}
_NAMED = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")  # `$$` is a dollar
_OF_SERVICE = re.compile(r"[A-Z0-9_]+_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
_KEYED = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


@dataclass(frozen=True)
class Reference:
    """A ConfigMap or Secret that a container takes variables from. `key`: one of its keys; None: all."""

    kind: str
    name: str
    key: str | None = None


@dataclass(frozen=True)
class Differences:
    """Variables that have other values, or are there in one of two pods only."""

    stale: list[str] = field(default_factory=list)  # an engine may keep their old values
    wrong: list[str] = field(default_factory=list)  # it may not


def fields(container: Mapping[str, Any]) -> dict[str, str]:
    """Variables that hold something of the pod → which field of it; through another variable, too."""
    found: dict[str, str] = {}
    for each in container.get("env") or ():
        source = each.get("valueFrom") or {}
        if path := (source.get("fieldRef") or {}).get("fieldPath"):
            found[each["name"]] = path
        elif resource := (source.get("resourceFieldRef") or {}).get("resource"):
            found[each["name"]] = resource
        elif through := next((name for name in _names(each.get("value")) if name in found), None):
            found[each["name"]] = found[through]
    return found


def bound(container: Mapping[str, Any], labels: Mapping[str, str], annotations: Mapping[str, str]) -> dict[str, str]:
    """Those of `fields` that are known to be others in the next pod. `labels`, `annotations`: that all its pods have."""
    found = {}
    for name, path in fields(container).items():
        keyed = _KEYED.fullmatch(path)
        if path in _EACH_POD or (keyed and keyed[2] not in (labels if keyed[1] == "labels" else annotations)):
            found[name] = path
    return found


def references(container: Mapping[str, Any]) -> list[Reference]:
    """Every ConfigMap and Secret behind its environment."""
    found = []
    for each in container.get("env") or ():
        source = each.get("valueFrom") or {}
        for kind, name in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
            if named := source.get(name):
                found.append(Reference(kind, named.get("name", ""), named.get("key", "")))
    for each in container.get("envFrom") or ():
        for kind, name in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if named := each.get(name):
                found.append(Reference(kind, named.get("name", "")))
    return found


def digests(environment: Mapping[str, str]) -> dict[str, str]:
    """What to remember of an environment so that another can be compared with it: no value can be read from it."""
    return {
        name: hashlib.blake2b(f"{name}={value}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        for name, value in _without_ours(environment).items()
    }


def _without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """As it would be without the agent, which may have been upgraded since the capture."""
    found = {name: value for name, value in environment.items() if name not in _OURS}
    if ours := [part for part in found.get(_PYTHON_PATH, "").split(":") if part.startswith(f"{ZEROWAKE_FOLDER}/")]:
        theirs = [part for part in found[_PYTHON_PATH].split(":") if part not in ours]
        found[_PYTHON_PATH] = ":".join(theirs)
        if not theirs:
            del found[_PYTHON_PATH]
    return found


def differences(
    captured: Mapping[str, str], environment: Mapping[str, str], container: Mapping[str, Any], *, allowed: bool = False
) -> Differences:
    """What is otherwise in `environment`, which belongs to `container`, than it was in the one whose digests are `captured`."""
    now = digests(environment)
    own, implicit = fields(container), _Implicit(container)
    found = Differences()
    for name in sorted(name for name in captured.keys() | now.keys() if captured.get(name) != now.get(name)):
        keeps = implicit.has(name) or (allowed and name in own)
        (found.stale if keeps else found.wrong).append(name)
    return found


class _Implicit:
    """Variables that nobody has asked for. Those of `envFrom` have no names here: then only those count whose names are Kubernetes' own."""

    def __init__(self, container: Mapping[str, Any]) -> None:
        env = container.get("env") or ()
        words = [*(container.get("command") or ()), *(container.get("args") or ()), *(each.get("value") for each in env)]
        self._asked = {each["name"] for each in env} | {name for word in words for name in _names(word)}
        self._unnamed = bool(container.get("envFrom"))

    def has(self, name: str) -> bool:
        if name in self._asked:
            return False
        return not self._unnamed or name == "HOSTNAME" or bool(_OF_SERVICE.fullmatch(name)) or name.startswith("NVIDIA_")


def _names(text: str | None) -> Iterator[str]:
    return (each[1] for each in _NAMED.finditer(text or "") if each[1])
