"""Which models have pods that load, by the pods' objects alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.loading_pods import LoadingPods
from tests.worlds.virtual_time import StandingClock


def pod(node: str = "n1", *, uid: str = "one", ready: str = "False", phase: str = "Running", deleted: str = "", **engine: Any) -> EnginePod:
    metadata = {"name": "p", "namespace": "ns", "uid": uid} | ({"deletionTimestamp": deleted} if deleted else {})
    status = {
        "phase": phase,
        "conditions": [{"type": "Ready", "status": ready}],
        "containerStatuses": [{"name": "engine", "state": {"running": {"startedAt": "2026-11-29T10:00:00Z"}}, **engine}],
    }
    return msgspec.convert({"metadata": metadata, "spec": {"containers": [], "nodeName": node}, "status": status}, EnginePod)


WAITS = {"state": {"waiting": {"reason": "ContainerCreating"}}}


def test_a_pod_loads_from_its_node_on_until_it_was_ready() -> None:
    loading = LoadingPods(lambda _: "chat")
    states = [pod("", phase="Pending", **WAITS), pod(phase="Pending", **WAITS), pod(), pod(ready="True"), pod()]
    seen = []
    for old, new in zip([None, *states], states, strict=False):
        loading.changed(old, new)
        seen.append(loading.of("chat"))
    assert seen == [False, True, True, False, False], "what was ready once loads no more"
    assert not loading.of("other")


def test_each_pod_counts_for_itself_and_goes_with_its_object() -> None:
    loading = LoadingPods(lambda _: "chat")
    loading.changed(None, pod())
    loading.changed(None, pod(uid="two"))
    loading.changed(pod(), None)
    assert loading.of("chat")
    loading.changed(pod(uid="two"), pod(uid="three", ready="True"))
    assert not loading.of("chat"), "another one of its name"


def test_one_that_hangs_counts_no_more() -> None:
    clock = StandingClock()
    loading = LoadingPods(lambda _: "chat", clock)
    loading.changed(None, pod())
    clock.moment = 1799.0
    loading.changed(pod(), pod(phase="Running"))
    assert loading.of("chat")
    clock.moment = 1800.0
    assert not loading.of("chat")


@pytest.mark.parametrize(
    "other",
    [
        pod(deleted="2026-11-29T10:00:01Z"),
        pod(phase="Failed"),
        pod(state={"waiting": {"reason": "ImagePullBackOff"}}),
        pod(state={"terminated": {"exitCode": 1}}),
        pod(lastState={"terminated": {"exitCode": 137}}),
    ],
    ids=["leaves", "has failed", "has no image", "has ended", "was started again"],
)
def test_who_loads_nothing(other: EnginePod) -> None:
    loading = LoadingPods(lambda _: "chat")
    loading.changed(None, pod())
    loading.changed(pod(), other)
    assert not loading.of("chat")


def test_a_pod_that_serves_no_model() -> None:
    loading = LoadingPods(lambda _: "")
    loading.changed(None, pod())
    assert not loading.of("")
