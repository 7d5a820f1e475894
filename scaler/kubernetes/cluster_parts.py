"""What `zerowake bundle --kubernetes` takes of a cluster: ModelSnapshots and ScaledObjects, events about them, and pods, with the logs and
metrics of zerowake's own. Secrets are never asked for, and of ConfigMaps the scaler's file alone is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from scaler.kubernetes.checkup import connected
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, NODES, SCALED_OBJECTS
from zerowake_shared.bundle import MOST, Part, Parts
from zerowake_shared.checkup import Subject
from zerowake_shared.kubernetes.errors import ClusterError
from zerowake_shared.kubernetes.resource import EVENTS, PODS, Resource
from zerowake_shared.pod_contract import GROUP

_CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
_DAEMON_SETS = Resource("apps/v1", "DaemonSet", "daemonsets")
_DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")
_LINES = "2000"  # of each container's log
_METRICS = {"scaler": "9090", "agent": "9091"}  # by container
_SECONDS = 60.0
_AT_ONCE = 8  # pods that are asked for

Object = dict[str, Any]


def _listed(name: str, resource: Resource, wanted: Callable[[Object], bool] = lambda _: True, own: bool = False) -> Part:
    """All objects of a kind; `own`: in zerowake's namespace."""

    async def gather(subject: Subject) -> Parts:
        async with connected() as cluster:
            found = await cluster.every(resource, Object, subject.namespace if own else "")
        return {f"kubernetes/{name}.json": [each for each in found if wanted(each)]}

    return Part(name, gather, _SECONDS, of_cluster=True)


def _is_ours(event: Object) -> bool:
    """Written by us, or about an object of ours."""
    about = event.get("regarding") or {}
    by = str(event.get("reportingController", ""))
    return by.startswith(f"{GROUP}/") or about.get("kind") in ("ModelSnapshot", "ScaledObject") or "zerowake" in str(about.get("name"))


def _is_labelled(pod: Object) -> bool:
    """A model's, or one of zerowake itself."""
    labels = pod["metadata"].get("labels") or {}
    return any(name.startswith(f"{GROUP}/") for name in labels) or str(labels.get("app.kubernetes.io/name", "")).startswith("zerowake")


async def pods(subject: Subject) -> Parts:
    """Logs and metrics of zerowake's own. What cannot be had of one is said in its place."""
    bound = asyncio.Semaphore(_AT_ONCE)
    found: dict[str, str] = {}
    async with connected() as cluster:

        async def take(name: str, path: str, query: Mapping[str, str] | None = None) -> None:
            async with bound:
                try:
                    found[name] = (await cluster.text(path, query))[-MOST:]
                except ClusterError as error:
                    found[name] = f"not to be had: {error}\n"

        wanted: list[Awaitable[None]] = []
        for pod in await cluster.every(PODS, Object, subject.namespace):
            name = pod["metadata"]["name"]
            for container in (pod.get("spec") or {}).get("containers") or ():
                of = container["name"]
                query = {"container": of, "tailLines": _LINES, "timestamps": "true"}
                log = PODS.path(subject.namespace, name, "log")
                wanted.append(take(f"kubernetes/logs/{name}/{of}.log", log, query))
                states = (pod.get("status") or {}).get("containerStatuses") or ()
                if any(each.get("name") == of and each.get("restartCount") for each in states):
                    wanted.append(take(f"kubernetes/logs/{name}/{of}.before.log", log, {**query, "previous": "true"}))
                if port := _METRICS.get(of):
                    page = PODS.path(subject.namespace, f"{name}:{port}", "proxy/metrics")
                    wanted.append(take(f"kubernetes/metrics/{name}.txt", page))
        await asyncio.gather(*wanted)
    return found


async def scaler_file(subject: Subject) -> Parts:
    """What the chart wrote for the scaler."""
    async with connected() as cluster:
        found = await cluster.get(_CONFIG_MAPS, subject.namespace, "zerowake-scaler", Object)
    return {"kubernetes/zerowake-scaler.json": json.loads(json.dumps(found.get("data") or {}))}


PARTS = (
    _listed("modelsnapshots", MODEL_SNAPSHOTS),
    _listed("scaledobjects", SCALED_OBJECTS),
    _listed("events", EVENTS, _is_ours),
    _listed("nodes", NODES),
    _listed("pods", PODS, _is_labelled),
    _listed("deployments", _DEPLOYMENTS, own=True),
    _listed("daemonsets", _DAEMON_SETS, own=True),
    Part("the scaler's file", scaler_file, _SECONDS, of_cluster=True),
    Part("pods' logs and metrics", pods, 2 * _SECONDS, of_cluster=True),
)
