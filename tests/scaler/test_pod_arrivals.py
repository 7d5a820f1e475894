"""On which nodes pods wait for their engines, by their objects alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.pod_arrivals import PodArrivals
from zerowake_shared import pod_contract

MARKED = {pod_contract.CONTAINER: "engine"}
READY = {"conditions": [{"type": "Ready", "status": "True"}]}


def pod(node: str, name: str = "one", annotations: dict[str, str] = MARKED, status: dict[str, Any] | None = None, **more: Any) -> EnginePod:
    metadata = {"name": name, "uid": name, "annotations": annotations, **more}
    return msgspec.convert({"metadata": metadata, "spec": {"containers": [], "nodeName": node}, "status": status or {}}, EnginePod)


class Seen:
    def __init__(self, model: str = "chat") -> None:
        self.came: list[str] = []
        self.arrivals = PodArrivals(lambda _: model, self.came.append)

    def changes(self, *states: EnginePod | None) -> None:
        for old, new in zip((None, *states), states, strict=False):
            self.arrivals.changed(old, new)


def test_a_pod_waits_from_its_node_on_until_it_is_ready() -> None:
    seen = Seen()
    seen.changes(pod(""), pod("n1"), pod("n1", status={"phase": "Running"}))
    assert (set(seen.arrivals.nodes("chat")), set(seen.arrivals.nodes("other")), seen.came) == ({"n1"}, set(), ["chat"])
    seen.arrivals.changed(pod("n1"), pod("n1", status=READY))
    assert not seen.arrivals.nodes("chat")


def test_each_pod_counts_for_itself() -> None:
    seen = Seen()
    seen.changes(pod("n1"))
    seen.changes(pod("n2", "two"))
    assert (set(seen.arrivals.nodes("chat")), seen.came) == ({"n1", "n2"}, ["chat", "chat"])
    seen.arrivals.changed(pod("n1"), None)
    assert set(seen.arrivals.nodes("chat")) == {"n2"}


@pytest.mark.parametrize(
    "other",
    [
        pod("n1", annotations={}),
        pod("n1", annotations={**MARKED, pod_contract.COLD: "no snapshot"}),
        pod("n1", deletionTimestamp="2026-11-27T20:00:00Z"),
        pod("n1", status={"phase": "Failed"}),
    ],
    ids=["is not to be restored", "has started cold", "leaves", "has ended"],
)
def test_who_waits_for_nothing(other: EnginePod) -> None:
    seen = Seen()
    seen.changes(pod("n1"), other)
    assert not seen.arrivals.nodes("chat")


def test_a_pod_that_may_serve_no_model_counts_for_nothing() -> None:
    seen = Seen(model="")
    seen.changes(pod("n1"))
    assert not seen.came and not seen.arrivals.nodes("")
