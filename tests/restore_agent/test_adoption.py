"""Engines of pods that run already: they serve as replicas, once they are healthy, whoever started them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.programs.on_kubernetes import pods_served
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin, State
from restore_agent.service import metrics
from tests.worlds.kubelet import NAMESPACE, Kubelet
from tests.worlds.waiting import until

pytestmark = pytest.mark.usefixtures("needs_runc")
TOLD = {"zerowake.dev/container": "engine", "zerowake.dev/port": "8000", "zerowake.dev/health": "/health"}


@pytest.fixture
async def node(kubelet: Kubelet, tmp_path: Path) -> AsyncIterator[Node]:
    async with (
        Node.open("node", tmp_path / "state", tmp_path / "memory", tmp_path / "gpumem.sock", metrics) as node,
        pods_served(node, kubelet.placeholder, tmp_path / "cri.sock"),
    ):
        yield node


async def test_a_labelled_pod_that_runs_its_own_command_is_a_replica(node: Node, kubelet: Kubelet) -> None:
    async with kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, TOLD, bare=True):
        await until(lambda: len(node.replicas))
        (replica,) = node.replicas
        assert (replica.origin, replica.namespace, replica.model) == (Origin.COLD, NAMESPACE, "small")
        await kubelet.api.remove("pods", NAMESPACE, "one")
        await until(lambda: replica.state is State.RETIRING)


async def test_a_capture_pod_without_a_placeholder_has_failed(node: Node, kubelet: Kubelet) -> None:
    async with kubelet.pod("capture", {"zerowake.dev/capture": "small"}, TOLD, bare=True):
        why = await kubelet.event("capture", "CaptureFailed")
        assert "was not connected to the container runtime" in why
        await until(lambda: "zerowake.dev/capture-failed" in kubelet.api.objects["pods", NAMESPACE, "capture"]["metadata"]["annotations"])
    assert not len(node.replicas)


async def test_a_pod_that_names_no_snapshot_and_no_port_is_left_alone(
    node: Node, kubelet: Kubelet, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {**TOLD, "zerowake.dev/port": "none"}
    async with kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, wrong, bare=True), kubelet.pod("two", {"app": "x"}, TOLD, bare=True):
        await until(lambda: "pod team/one takes no part in serving: annotation zerowake.dev/port" in caplog.text)
    assert not len(node.replicas)
    assert "team/two" not in caplog.text
