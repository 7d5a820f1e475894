"""The pods that snapshots are captured in: how they are made, what of them is shown, and whose they are."""

import asyncio
from typing import Any

import pytest
from zerowake_proto import agent_pb2

from scaler.kubernetes.resources import FINALIZER
from tests.worlds.controlled import DIGEST, OTHER, TEMPLATE, World
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import CAPTURED


async def test_a_template_is_captured(world: World) -> None:
    agent = await world.node("n1")
    await until(lambda: any(node.synced for node in world.nodes))
    await world.snapshot()
    await until(world.pods)
    pod = world.pods()[0]
    engine = pod["spec"]["containers"][0]
    assert pod["metadata"]["ownerReferences"][0]["name"] == "chat"
    assert pod["metadata"]["labels"] == {
        "app": "chat",
        "zerowake.dev/capture": "chat",
    }
    assert engine["command"] == ["serve"] and engine["args"] == ["$(PORT)"]
    assert pod["metadata"]["annotations"]["zerowake.dev/container"] == engine["name"]
    assert "livenessProbe" not in engine and pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 1, "what has been captured holds its CPUs no longer than it must"
    assert pod["spec"]["nodeSelector"] == {"zerowake": "yes"}
    assert pod["spec"]["readinessGates"], "no Service may route to it"
    await until(lambda: world.status().get("phase") == "Capturing")

    await world.says(CAPTURED, DIGEST)
    await until(lambda: world.status().get("digest") == DIGEST)
    assert world.condition("Captured")[0] == "True" and world.condition("Ready")[:2] == ("False", "NotResident")
    agent.has("tenant", "chat", DIGEST, size=7)
    await until(lambda: world.status().get("phase") == "Ready")
    assert world.status()["locations"] == [{"name": "n1", "rung": "memory"}] and world.status()["imageBytes"] == 7
    await until(lambda: not world.pods())
    agent.has("tenant", "chat", DIGEST, rung=agent_pb2.RUNG_DISK)
    await until(lambda: world.status()["locations"] == [{"name": "n1", "rung": "disk"}])
    await asyncio.sleep(0.3)
    assert not world.pods() and world.reasons() == ["Captured"], "and not once more"
    found = world.api.get("modelsnapshots", "tenant", "chat")
    assert found and found["metadata"]["finalizers"] == [FINALIZER] and found["status"]["observedGeneration"] == 1


async def test_what_a_capture_waits_for_is_shown(world: World) -> None:
    await world.snapshot()
    await until(world.pods)
    name = world.pods()[0]["metadata"]["name"]
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes: no GPU"}
    await world.api.change("pods", "tenant", name, {"status": {"phase": "Pending", "conditions": [unscheduled]}})
    await until(lambda: "no GPU" in world.condition("Captured")[2])
    waiting = {"conditions": None, "containerStatuses": [{"name": "engine", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}
    await world.api.change("pods", "tenant", name, {"status": waiting})
    await until(lambda: "ImagePullBackOff" in world.condition("Captured")[2])


@pytest.mark.parametrize(
    ("pod", "message"),
    [
        ({"hostPID": True}, "hostPID"),
        ({"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"containers": [{"name": "engine", "image": "i", "securityContext": {"privileged": True}}]}, "privileged"),
        ({"containers": []}, "no container"),
    ],
)
async def test_a_template_that_wants_the_host_is_refused(world: World, pod: dict[str, Any], message: str) -> None:
    await world.snapshot(template={"spec": {**TEMPLATE["spec"], **pod}})
    await until(lambda: world.status().get("phase") == "Failed")
    assert world.condition("Captured")[1] == "TemplateRefused" and message in world.condition("Captured")[2]
    await until(lambda: world.reasons() == ["SnapshotRefused"])
    assert not world.pods()


async def test_a_forged_capture_pod_is_neither_believed_nor_deleted(world: World) -> None:
    forged = {
        "metadata": {
            "name": "forged",
            "namespace": "tenant",
            "labels": {"zerowake.dev/capture": "chat"},
            "annotations": {CAPTURED: OTHER},
        }
    }
    await world.api.put("pods", forged)
    await world.snapshot()
    await until(lambda: len(world.pods()) == 2)
    await asyncio.sleep(0.2)
    assert not world.status().get("digest")
    assert world.api.get("pods", "tenant", "forged")
