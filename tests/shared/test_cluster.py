"""What is asked of Kubernetes' API, what it refuses, and the events that are written."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds.bare_object import Meta, Metadata, pod
from tests.worlds.kubernetes_api import Api
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError, Conflict, NotFound
from zerowake_shared.kubernetes.resource import PODS, Resource

NODES = Resource("v1", "Node", "nodes")


async def test_errors_name_what_was_asked(api: Api, cluster: Cluster) -> None:
    with pytest.raises(NotFound, match=r"GET /api/v1/nodes/nowhere: .*not found.*404"):
        await cluster.get(NODES, "", "nowhere", Meta)
    api.refuse.append(("POST", "pods", 403, 'pods "x" is forbidden: exceeded quota'))
    with pytest.raises(ClusterError, match="exceeded quota") as refused:
        await cluster.create(PODS, "tenant", {"metadata": {"name": "x"}})
    assert refused.value.status == 403
    made = await api.put("pods", pod("a"))
    with pytest.raises(Conflict):
        await cluster.patch(PODS, "tenant", "a", {"metadata": {"resourceVersion": "0", "labels": {"x": "y"}}})
    await cluster.delete(PODS, "tenant", "a", uid="another")
    assert api.get("pods", "tenant", "a") == made, "a later pod of the same name is not deleted"
    await cluster.delete(PODS, "tenant", "a", uid=made["metadata"]["uid"])
    await cluster.delete(PODS, "tenant", "a")
    assert api.get("pods", "tenant", "a") is None


async def test_the_same_event_is_told_once(api: Api, cluster: Cluster) -> None:
    about = Metadata(name="chat", namespace="tenant", uid="u", resource_version="1")
    for _ in range(3):
        await cluster.event(PODS, about, "Warning", "CaptureFailed", "no room", "Capture")
    await cluster.event(PODS, about, "Warning", "CaptureFailed", "x" * 5000, "Capture")
    notes = [each["note"] for each in api.all("events")]
    assert notes[0] == "no room" and len(notes) == 2 and len(notes[1]) == 1000
    api.refuse.append(("POST", "events", 500, "no"))
    await cluster.event(PODS, about, "Normal", "Captured", "lost", "Capture")


async def test_what_is_in_no_namespace_has_its_events_in_the_default_one(api: Api, cluster: Cluster) -> None:
    await cluster.event(Resource("v1", "Node", "nodes"), Metadata(name="n1", uid="u"), "Normal", "OrphanRemoved", "it is gone", "Remove")
    (event,) = api.all("events")
    assert (event["metadata"]["namespace"], event["regarding"]["kind"], event["regarding"]["namespace"]) == ("default", "Node", "")


async def test_a_long_name_has_events_too(api: Api, cluster: Cluster) -> None:
    about = Metadata(name="a" * 199 + "." + "b" * 53, namespace="tenant", uid="u")
    await cluster.event(PODS, about, "Normal", "Restored", "in 0.4 s", "Restore")
    (event,) = api.all("events")
    assert len(event["metadata"]["name"]) < 253 and event["regarding"]["name"] == about.name
    assert (event["reportingController"], event["reportingInstance"]) == ("zerowake.dev/test", "test")
    assert ".." not in event["metadata"]["name"]


async def test_an_answer_that_is_not_as_declared_is_an_error_of_the_cluster(api: Api, cluster: Cluster) -> None:
    await api.put("pods", {"metadata": {"name": "odd", "namespace": "tenant", "labels": {"a": 1}}})
    with pytest.raises(ClusterError, match="pods/odd: the answer is not as its schema says"):
        await cluster.get(PODS, "tenant", "odd", Meta)


async def test_without_a_cluster_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="run in a pod, or set KUBECONFIG"):
        async with Cluster.connect(reporter="zerowake.dev/test", instance="test"):
            pass


def test_a_command_line_does_not_wait_for_what_serves() -> None:
    """The import of each takes longer than `zerowake status` needs to answer."""
    rooms = ("scaler", "restore_agent", "gpumem")
    imports = ", ".join(f"{room}.programs.commands" for room in rooms)
    program = f"import sys, {imports}; print(sys.modules.keys() & {{'kubernetes', 'numpy', 'redis'}})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
