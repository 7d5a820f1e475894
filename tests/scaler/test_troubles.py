"""What is said of a model without a replica: by its pods' statuses, as a kubelet writes them, and by what scales it."""

import itertools
from typing import Any

import msgspec
import pytest

from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.scaled_object import ScaledObject
from scaler.kubernetes.troubles import Troubles, failed_start

LAST = {"terminated": {"exitCode": 1, "reason": "Error", "startedAt": "2026-11-26T10:00:00Z"}}


def pod(name: str = "chat-1", made: str = "2026-11-26T10:00:00Z", **status: Any) -> EnginePod:
    metadata = {"name": name, "namespace": "tenant", "creationTimestamp": made}
    return msgspec.convert({"metadata": metadata, "spec": {}, "status": {"phase": "Pending", **status}}, EnginePod)


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {"name": "engine", "state": {"waiting": {"reason": reason, "message": message}}, **more}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            pod(containerStatuses=[waiting("CrashLoopBackOff", "back-off 10s", lastState=LAST)]),
            "pod chat-1 waits: container engine: CrashLoopBackOff: back-off 10s; it ended with exit code 1 before (Error)",
        ),
        (pod(containerStatuses=[waiting("ErrImagePull", "not found")]), "pod chat-1 waits: container engine: ErrImagePull: not found"),
        (pod(containerStatuses=[waiting("CreateContainerConfigError", 'secret "x" not found')]), 'CreateContainerConfigError: secret "x"'),
        (pod(initContainerStatuses=[waiting("CrashLoopBackOff")], containerStatuses=[waiting("PodInitializing")]), "CrashLoopBackOff"),
        (pod(containerStatuses=[{"name": "engine", "state": LAST}]), "pod chat-1 waits: container engine ended with exit code 1 (Error)"),
        (
            pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: no GPU"}]),
            "pod chat-1 has no node: 0/1 nodes: no GPU",
        ),
        (pod(phase="Failed", reason="Evicted", message="the node was low on memory"), "failed: Evicted: the node was low on memory"),
        (pod(containerStatuses=[waiting("ContainerCreating")]), ""),
        (pod(phase="Running", containerStatuses=[{"name": "engine", "state": {"running": {"startedAt": "x"}}}]), ""),
    ],
)
def test_a_pod_s_own_words(found: EnginePod, said: str) -> None:
    told = Troubles(lambda model: [found], lambda model: [], lambda model: "tenant").of("chat")
    assert said in told and bool(said) == bool(told)


def test_the_newest_that_is_in_trouble_counts() -> None:
    pods = [
        pod("older", containerStatuses=[waiting("ErrImagePull")]),
        pod("newer", "2026-11-26T11:00:00Z", phase="Failed"),
        pod("fine", "2026-12-01"),
    ]
    assert Troubles(lambda model: pods, lambda model: [], lambda model: "tenant").of("chat") == "pod newer failed"


def test_without_a_pod_it_is_what_scales_it() -> None:
    scaled = ScaledObject(msgspec.convert({"name": "chat-scaler", "namespace": "tenant"}, type(pod().metadata)))
    alone = Troubles(lambda model: [], lambda model: [], lambda model: "tenant").of("chat")
    assert "no ScaledObject of namespace tenant has a trigger for it" in alone
    waits = Troubles(lambda model: [], lambda model: [scaled], lambda model: "tenant").of("chat")
    assert "`kubectl -n tenant describe scaledobject chat-scaler` says why" in waits


def test_each_failed_start_counts_once() -> None:
    crashed = pod(containerStatuses=[{"name": "engine", "state": LAST}])
    paused = pod(containerStatuses=[waiting("CrashLoopBackOff", "back-off 10s", lastState=LAST)])
    unpulled = pod(containerStatuses=[waiting("ErrImagePull", "not found")])
    unpaused = pod(containerStatuses=[waiting("ImagePullBackOff")])
    runs = pod(phase="Running", containerStatuses=[{"name": "engine", "state": {"running": {"startedAt": "x"}}}])
    no_room = pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}])
    life = [None, no_room, runs, crashed, crashed, paused, runs, paused, runs, crashed, None, unpulled, unpaused, unpulled, unpaused]
    failures = [bool(failed_start(old, new)) for old, new in itertools.pairwise(life)]
    counted = [new for new, failed in zip(life[1:], failures, strict=True) if failed]
    assert counted == [crashed, paused, crashed, unpulled, unpulled]
    assert "exit code 1" in failed_start(runs, crashed)
