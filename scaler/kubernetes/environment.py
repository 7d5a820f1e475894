"""What of a template's environment is not as it will be in the next pod, and the ConfigMaps and Secrets behind it.

A restored engine has the environment of the pod that it was captured in (zerowake_shared/pod_environment.py). A template that asks for
fields of its pod is refused before anything is captured, unless its owner allows old values; what nobody asked for is only told. Contents
of ConfigMaps and Secrets count as part of the template: they are read now and again, since following all Secrets of a cluster would need
more rights than that. The agent compares once more what a pod really gets, so that an old Secret is never served in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from scaler.kubernetes.pod_patch import engine_of
from scaler.kubernetes.resources import CONDITION_STALE, Condition, ModelSnapshot
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError, NotFound
from zerowake_shared.kubernetes.resource import Resource
from zerowake_shared.pod_contract import CAPTURE, SNAPSHOT
from zerowake_shared.pod_environment import ALLOWED, bound, references

_SOURCES = {"ConfigMap": Resource("v1", "ConfigMap", "configmaps"), "Secret": Resource("v1", "Secret", "secrets")}


class _Source(msgspec.Struct, rename="camel"):
    """A ConfigMap or a Secret."""

    metadata: dict[str, Any] = {}
    data: dict[str, str] = {}
    binary_data: dict[str, str] = {}


def refusal(snapshot: ModelSnapshot) -> str:
    """Why its engine would be a wrong one in every other pod; empty: it would not, or that is allowed."""
    if snapshot.spec.stale_environment == ALLOWED or not (found := _bound(snapshot)):
        return ""
    named = ", ".join(f"{name} ({path})" for name, path in found.items())
    return (
        f"the environment names the pod itself: {named}; a restored engine keeps what the capture pod had. Leave it out, "
        f"or set spec.staleEnvironment: {ALLOWED} if old values do no harm (engines find the right ones in environment.json)"
    )


def condition(snapshot: ModelSnapshot) -> Condition:
    """What restored engines keep of the capture pod."""
    kept = [f"{name} ({path})" for name, path in _bound(snapshot).items()]
    spec = (snapshot.spec.template or {}).get("spec") or {}
    kept += ["HOSTNAME"] if not spec.get("hostname") else []
    kept += ["the addresses of the namespace's Services"] if spec.get("enableServiceLinks", True) else []
    reason = "Allowed" if _bound(snapshot) else "Implicit" if kept else "None"
    message = f"restored engines keep the capture pod's {', '.join(kept)}" if kept else ""
    return Condition(CONDITION_STALE, "True" if kept else "False", reason, message, observed_generation=snapshot.metadata.generation)


def has_references(snapshot: ModelSnapshot) -> bool:
    return bool(references(_engine(snapshot)))


async def contents(cluster: Cluster, snapshot: ModelSnapshot) -> str:
    """Hash of what stands in the ConfigMaps and Secrets behind its environment; empty: there are none.

    Nothing can be guessed from it by whoever may not read them: it is keyed by what only they know, each one's own uid.

    Raises: ClusterError: they cannot be read.
    """
    every = references(_engine(snapshot))
    if not every:
        return ""
    whole = hashlib.blake2b(digest_size=8)
    known: dict[tuple[str, str], _Source] = {}
    for each in every:
        if (each.kind, each.name) not in known:
            try:
                known[each.kind, each.name] = await cluster.get(_SOURCES[each.kind], snapshot.metadata.namespace, each.name, _Source)
            except NotFound:
                known[each.kind, each.name] = _Source()  # an optional one; of another the kubelet makes no container
        source = known[each.kind, each.name]
        values = source.data | source.binary_data
        kept = values if each.key is None else {each.key: values.get(each.key)}
        key = str(source.metadata.get("uid", "")).encode()[:64]
        whole.update(hashlib.blake2b(msgspec.json.encode((each.kind, each.name, kept), order="sorted"), key=key, digest_size=32).digest())
    return whole.hexdigest()


def unreadable(error: ClusterError) -> str:
    """What to say where the API refuses them."""
    return f"the ConfigMaps and Secrets of its environment cannot be read, so that a change of them is not noticed: {error}"


def _bound(snapshot: ModelSnapshot) -> dict[str, str]:
    metadata = (snapshot.spec.template or {}).get("metadata") or {}
    labels = {key: value for key, value in (metadata.get("labels") or {}).items() if key not in (SNAPSHOT, CAPTURE)}
    return bound(_engine(snapshot), labels, metadata.get("annotations") or {})


def _engine(snapshot: ModelSnapshot) -> Mapping[str, Any]:
    spec = (snapshot.spec.template or {}).get("spec") or {}
    index = engine_of(spec, snapshot)
    found: Mapping[str, Any] = {} if index is None else spec["containers"][index]
    return found
