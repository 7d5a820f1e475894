"""The pod in which a snapshot is captured, and what it tells of how far it is.

It is the user's template, marked for the agent as the pods are that will be restored: its node's agent puts a placeholder before the
engine there too, since the engine must not be the container's first process. The agent of its node starts the engine, waits for its
health, asks the recorded request, takes the snapshot and writes the result on the pod. The pod must never serve: a readiness gate that
nobody ever grants keeps it out of every Service whose selector its labels match (they stay, since network policies go by labels too).
Probes would kill an engine that stands still while it is dumped, so it has none.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import msgspec

from scaler.kubernetes import environment
from scaler.kubernetes.pod_patch import NodeSetup, Patch, engine_of, prepare, refused
from scaler.kubernetes.resources import ContainerStatus, ModelSnapshot, Pod
from scaler.plan.actions import Prefer
from zerowake_shared import pod_contract

_DEADLINE_SECONDS = 3600
_GRACE_SECONDS = 1
_NEVER_GRANTED = f"{pod_contract.GROUP}/captured"


@dataclass(frozen=True, slots=True)
class Progress:
    """How a capture stands. `digest`: it is done; `failure`: it has failed; neither: `detail` says what it waits for.

    missed: it has failed since the agent came too late for this pod, and had nothing to do with what is captured.
    for_good: it has failed, and would again for this template.
    """

    digest: str = ""
    failure: str = ""
    for_good: bool = False
    detail: str = ""
    missed: bool = False


def name_of(snapshot: ModelSnapshot) -> str:
    """The same for the same template: whoever tries to start a capture twice finds the name taken."""
    return f"{snapshot.metadata.name}-capture-{snapshot.template_hash}"


def refusal(snapshot: ModelSnapshot) -> str:
    """Why no capture can be made of this template; empty: one can be tried."""
    spec = (snapshot.spec.template or {}).get("spec") or {}
    index = engine_of(spec, snapshot)
    if index is None:
        wanted = f"no container {snapshot.spec.container!r}" if snapshot.spec.container else "no container"
        return f"spec.template has {wanted}"
    if reason := refused(spec, index):
        return f"no snapshot is taken of such a pod: {reason}"
    return environment.refusal(snapshot)


def pod_for(snapshot: ModelSnapshot, setup: NodeSetup, nodes: Prefer, contents: str = "") -> dict[str, Any]:
    """The pod to create. `nodes`: the plan's preference. `contents`: what stands behind its environment, as environment.py hashes it.
    Only for a template that is not refused."""
    template = copy.deepcopy(snapshot.spec.template or {})
    spec = template["spec"]
    of_template = template.get("metadata") or {}
    labels = {key: value for key, value in (of_template.get("labels") or {}).items() if key != pod_contract.SNAPSHOT}
    owner = {
        "apiVersion": f"{pod_contract.GROUP}/v1alpha1",
        "kind": "ModelSnapshot",
        "name": snapshot.metadata.name,
        "uid": snapshot.metadata.uid,
        "controller": True,
    }
    pod: dict[str, Any] = {
        "metadata": {
            "name": name_of(snapshot),
            "labels": {**labels, pod_contract.CAPTURE: snapshot.metadata.name},
            "annotations": dict(of_template.get("annotations") or {}),
            "ownerReferences": [owner],
        },
        "spec": spec,
    }
    of_agent = (pod_contract.CAPTURED, pod_contract.CAPTURE_FAILED, pod_contract.CAPTURE_MISSED, pod_contract.CAPTURE_REFUSED)
    for result in (*of_agent, pod_contract.CANARY, pod_contract.NAMES):
        pod["metadata"]["annotations"].pop(result, None)  # the agent's to write, not the template's
    pod["metadata"]["annotations"][pod_contract.CONTENTS] = contents
    pod["metadata"]["annotations"][pod_contract.TEMPLATE] = snapshot.template_hash
    if snapshot.spec.canary is not None:
        pod["metadata"]["annotations"][pod_contract.CANARY] = json.dumps(msgspec.to_builtins(snapshot.spec.canary))
    if snapshot.spec.names:
        pod["metadata"]["annotations"][pod_contract.NAMES] = json.dumps(snapshot.spec.names)
    index = engine_of(spec, snapshot)
    assert index is not None
    for probe in ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle"):
        spec["containers"][index].pop(probe, None)
    spec["restartPolicy"] = "Never"
    spec["activeDeadlineSeconds"] = _DEADLINE_SECONDS
    spec["terminationGracePeriodSeconds"] = _GRACE_SECONDS  # when it is deleted there is nothing left to finish, in no container of it
    spec["readinessGates"] = [{"conditionType": _NEVER_GRANTED}]
    spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), **snapshot.spec.node_selector}
    prepare(Patch(pod), snapshot, setup, nodes)
    return pod


def progress(pod: Pod) -> Progress:
    annotations = pod.metadata.annotations
    if digest := annotations.get(pod_contract.CAPTURED):
        return Progress(digest=digest)
    if reason := annotations.get(pod_contract.CAPTURE_FAILED):
        missed, for_good = pod_contract.CAPTURE_MISSED in annotations, pod_contract.CAPTURE_REFUSED in annotations
        return Progress(failure=reason, missed=missed, for_good=for_good)
    if pod.has_ended:
        ended = [_ending(each) for each in pod.status.container_statuses if each.state.terminated is not None]
        said = ": ".join(part for part in (pod.status.reason, pod.status.message) if part) or "; ".join(ended)
        return Progress(failure=f"the capture pod ended before the snapshot was taken ({said or pod.status.phase})")
    scheduled = next((each for each in pod.status.conditions if each.type == "PodScheduled"), None)
    if scheduled is not None and scheduled.status == "False":
        return Progress(detail=f"the capture pod has no node yet: {scheduled.message or scheduled.reason}")
    for each in pod.status.container_statuses:
        reason = (each.state.waiting or {}).get("reason", "")
        if reason and reason not in {"ContainerCreating", "PodInitializing"}:
            return Progress(detail=f"container {each.name} waits: {reason}: {(each.state.waiting or {}).get('message', '')}")
    where = f" on node {pod.spec.node_name}" if pod.spec.node_name else ""
    return Progress(detail=f"pod {pod.metadata.name} runs{where}")


def _ending(container: ContainerStatus) -> str:
    ended = container.state.terminated or {}
    return f"container {container.name} ended with exit code {ended.get('exitCode')}, {ended.get('reason', 'no reason given')}"
