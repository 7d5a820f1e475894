"""The ModelSnapshot controller, against an API server and agents that do what a test wants."""

import asyncio
import time
from contextlib import AsyncExitStack

import pytest
from zerowake_proto import agent_pb2

from scaler.kubernetes.controller import run_controller
from scaler.kubernetes.pod_patch import NodeSetup
from scaler.kubernetes.refusals import Refusals
from scaler.kubernetes.resources import MODEL_SNAPSHOTS
from scaler.kubernetes.unmatched import Unmatched
from tests.worlds.controlled import DIGEST, OTHER, TEMPLATE, World
from tests.worlds.fake_agent import Agent
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import CAPTURE_FAILED, CAPTURE_MISSED, CAPTURE_REFUSED, CAPTURED, COLD, NAMES, SNAPSHOT


async def test_the_agent_is_told_what_else_the_engine_answers_to(world: World) -> None:
    """By the object, and not by its template, which is its owner's."""
    of_template = {"metadata": {**TEMPLATE["metadata"], "annotations": {NAMES: '["forged"]'}}, "spec": TEMPLATE["spec"]}
    await world.snapshot("plain", template=of_template)
    await world.snapshot("tuned", template=of_template, names=["sql", "poet"])
    await until(lambda: len(world.pods()) == 2)
    told = {pod["metadata"]["labels"]["zerowake.dev/capture"]: pod["metadata"]["annotations"].get(NAMES) for pod in world.pods()}
    assert told == {"plain": None, "tuned": '["sql", "poet"]'}


async def test_a_failed_capture_is_told_and_tried_again(world: World) -> None:
    await world.snapshot()
    await world.says(CAPTURE_FAILED, "the engine was never healthy")
    await until(lambda: world.status().get("phase") == "Failed")
    assert world.condition("Captured") == ("False", "CaptureFailed", "the engine was never healthy")
    await until(lambda: "CaptureFailed" in world.reasons())
    await until(lambda: world.status().get("phase") == "Capturing")  # 0.3 s later, in a new pod
    await world.says(CAPTURED, DIGEST)
    await until(lambda: world.status().get("digest") == DIGEST)


async def test_nothing_is_captured_before_there_is_an_agent(without_agents: World) -> None:
    world = without_agents
    await world.snapshot()
    await until(lambda: world.condition("Captured")[:2] == ("False", "NoAgent"))
    assert "agent.nodeSelector" in world.condition("Ready")[2] and not world.pods()
    await world.node("n1")
    await until(world.pods)
    await until(lambda: world.status().get("phase") == "Capturing")


async def test_a_pod_that_came_before_its_agent_is_followed_by_another_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.kubernetes.failed_capture.FIRST_RETRY_SECONDS", 600.0)
    monkeypatch.setattr("scaler.kubernetes.controller._MISSED_SECONDS", 0.1)
    missed = {CAPTURE_FAILED: "its container was made while this node's agent was not connected", CAPTURE_MISSED: "true"}
    await world.snapshot()
    await until(world.pods)
    first = world.pods()[0]["metadata"]
    await world.api.change("pods", "tenant", first["name"], {"metadata": {"annotations": missed}})
    await until(lambda: world.pods() and world.pods()[0]["metadata"]["uid"] != first["uid"])
    await world.api.change("pods", "tenant", first["name"], {"metadata": {"annotations": missed}})
    await until(lambda: world.condition("Captured")[1] == "CaptureFailed" and not world.pods())
    assert any("tried again in 600 s" in each["note"] for each in world.api.all("events")), "a second one is tried like any other"


async def test_cold_starts_are_told(world: World) -> None:
    """A condition and an event of the ModelSnapshot, and an event of the pod: by the webhook's annotation, and by the agent's."""
    await world.snapshot()
    await world.says(CAPTURED, DIGEST)
    world.agents["n0"].has("tenant", "chat", DIGEST)
    await until(lambda: world.status().get("phase") == "Ready")
    why = "image of container 'engine' is not the snapshot's"

    async def pod(name: str, seconds: int, **annotations: str) -> None:
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
        metadata = {"name": name, "namespace": "tenant", "labels": {SNAPSHOT: "chat"}, "creationTimestamp": made}
        found = {f"zerowake.dev/{name}": value for name, value in annotations.items()}
        await world.api.put("pods", {"metadata": {**metadata, "annotations": found}, "spec": {}})

    def told(kind: str) -> list[str]:
        events = world.api.all("events")
        return [each["note"] for each in events if each["reason"] == "ColdStart" and each["regarding"]["kind"] == kind]

    await pod("earlier", -3600, cold="ModelSnapshot 'chat' is not Ready")
    await pod("other", 5, cold=why)
    await until(lambda: world.condition("Restores") == ("False", "ColdStart", f"pod other started cold: {why}"))
    await until(lambda: told("ModelSnapshot") == [f"pod other started cold: {why}"] and told("Pod") == [f"its engine starts cold: {why}"])
    assert world.status()["phase"] == "Ready"
    await pod("opted-out", 6, restore="false")
    await pod("restored", 7, container="engine")
    await until(lambda: world.condition("Restores")[:2] == ("True", "Restored"))
    await pod("failed", 8, container="engine", cold="its GPU is another model")
    await until(lambda: "its GPU is another model" in world.condition("Restores")[2])
    assert "and 1 more did" in world.condition("Restores")[2]
    assert len(told("Pod")) == 1, "the agent tells of a restore that failed"


async def test_a_label_without_a_snapshot_is_told_at_the_pod(world: World) -> None:
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    why = "there is no ModelSnapshot 'chta' in namespace 'tenant'"
    metadata = {"name": "p", "namespace": "tenant", "labels": {SNAPSHOT: "chta"}, "annotations": {COLD: why}, "creationTimestamp": made}
    await world.api.put("pods", {"metadata": metadata, "spec": {}})
    await until(lambda: [each["note"] for each in world.api.all("events")] == [f"its engine starts cold: {why}"])


async def test_a_capture_that_no_other_try_can_mend_is_not_tried_again_until_the_template_changes(world: World) -> None:
    await world.snapshot()
    await until(world.pods)
    name = world.pods()[0]["metadata"]["name"]
    refused = {CAPTURE_FAILED: "its output is a terminal", CAPTURE_REFUSED: "true"}
    await world.api.change("pods", "tenant", name, {"metadata": {"annotations": refused}})
    await until(lambda: world.condition("Captured") == ("False", "CaptureRefused", "its output is a terminal"))
    await until(lambda: not world.pods() and world.reasons() == ["CaptureRefused"])
    await world.step_down()
    await world.lead()  # a new leader looks once more
    await asyncio.sleep(0.5)  # longer than until the next try of one that may end in another way
    assert not world.pods() and world.reasons() == ["CaptureRefused"]
    changed = {"template": {"spec": {"containers": [{"name": "engine", "image": "engine:2"}]}}}
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": changed})
    await until(world.pods)


async def test_a_pod_that_ends_or_is_refused_is_a_failure(world: World) -> None:
    await world.snapshot()
    await until(world.pods)
    state = {"terminated": {"exitCode": 3, "reason": "Error"}}
    ended = {"status": {"phase": "Failed", "containerStatuses": [{"name": "engine", "state": state}]}}
    await world.api.change("pods", "tenant", world.pods()[0]["metadata"]["name"], ended)
    await until(lambda: "exit code 3" in world.condition("Captured")[2])
    world.api.refuse.append(("POST", "/pods", 403, "violates PodSecurity"))
    await until(lambda: "violates PodSecurity" in world.condition("Captured")[2])
    await until(world.pods)


async def test_a_changed_template_is_captured_anew_and_the_old_one_is_not_used(world: World) -> None:
    agent = await world.node("n1")
    await world.snapshot()
    await world.says(CAPTURED, DIGEST)
    agent.has("tenant", "chat", DIGEST)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    newer = {"spec": {"containers": [{"name": "engine", "image": "engine:2"}]}}
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"template": newer}})
    await until(lambda: world.status().get("phase") == "Capturing")
    assert world.condition("Ready")[0] == "False"
    found = world.informer.get("tenant", "chat")
    assert found and not found.ready_digest
    await world.says(CAPTURED, OTHER)
    agent.has("tenant", "chat", OTHER)
    await until(lambda: world.status().get("phase") == "Ready")
    assert world.status()["digest"] == OTHER and world.status()["observedGeneration"] == 2
    # What a capture does not depend on changes nothing about it.
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"limits": {"concurrency": 2}}})
    await until(lambda: world.status()["observedGeneration"] == 3)
    assert world.status()["phase"] == "Ready"
    await until(lambda: not world.pods())


async def test_a_template_changed_during_its_capture_ends_that(world: World) -> None:
    await world.snapshot()
    await until(world.pods)
    first = world.pods()[0]["metadata"]["name"]
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"port": 9000}})
    await until(lambda: [pod["metadata"]["name"] for pod in world.pods()] not in ([], [first]))


async def test_another_leader_goes_on(world: World) -> None:
    await world.snapshot()
    await until(world.pods)
    pod = world.pods()[0]["metadata"]["uid"]
    await world.step_down()
    await world.says(CAPTURED, DIGEST)
    agent = await world.node("n1")
    agent.has("tenant", "chat", DIGEST)
    await asyncio.sleep(0.2)
    assert not world.status().get("digest"), "who does not lead writes nothing"
    await world.lead()
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    assert pod not in [each["metadata"]["uid"] for each in world.pods()]


async def test_an_artifact_is_adopted(world: World) -> None:
    agent = await world.node("n1")
    await world.snapshot("mine", artifact={"name": "chat", "digest": DIGEST})
    await until(lambda: world.condition("Captured", "mine")[1] == "NotFound")
    agent.has("other", "chat", DIGEST)  # another tenant's
    agent.has("tenant", "chat", OTHER)  # another digest
    await asyncio.sleep(0.4)
    assert world.status("mine")["phase"] == "Pending"
    agent.has("tenant", "chat", DIGEST)
    await until(lambda: world.status("mine")["phase"] == "Ready")
    assert world.status("mine")["digest"] == DIGEST and not world.pods()
    assert world.condition("Ready", "mine") == ("True", "Resident", "on 1 node(s)")
    await world.api.change("modelsnapshots", "tenant", "mine", {"spec": {"stage": "parked"}})
    await until(lambda: "on 1 node(s); spec.stage: parked counts as memory" in world.condition("Ready", "mine")[2])
    agent.has("tenant", "chat", DIGEST, unusable="another kernel")
    await until(lambda: world.condition("Ready", "mine") == ("False", "Unusable", "on node n1: another kernel"))


async def test_a_name_that_is_another_namespaces(world: World) -> None:
    """It is not Ready for as long as that is so, and says why."""
    agent = await world.node("n1")
    for namespace, born in (("other", 1), ("tenant", 2)):
        agent.has(namespace, "chat", DIGEST)
        metadata = {"name": "chat", "namespace": namespace, "creationTimestamp": f"2026-01-01T00:00:0{born}Z"}
        await world.api.put("modelsnapshots", {"metadata": metadata, "spec": {"artifact": {"name": "chat", "digest": DIGEST}}})
    await until(lambda: world.condition("Ready")[1] == "ModelNameTaken")
    assert "names the model chat, which is namespace other's already" in world.condition("Ready")[2]
    assert world.status()["phase"] == "Pending"
    await world.cluster.delete(MODEL_SNAPSHOTS, "other", "chat")
    await until(lambda: world.condition("Ready")[:2] == ("True", "Resident"))


async def test_a_snapshot_that_all_nodes_lost_is_captured_again(world: World) -> None:
    agent = await world.node("n1")
    await world.snapshot()
    await world.says(CAPTURED, DIGEST)
    agent.has("tenant", "chat", DIGEST)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    agent.loses("tenant", "chat")
    await until(world.pods)
    await until(lambda: world.status().get("phase") == "Capturing")
    assert not world.status().get("digest")


async def test_a_node_that_is_not_heard_of_ages_out(world: World) -> None:
    agent, other = await world.node("n1"), Agent("n2")
    await world.api.put("nodes", {"metadata": {"name": "n2"}})
    async with AsyncExitStack() as serving, world.nodes.follow(await serving.enter_async_context(other.serve())):
        await world.snapshot()
        await world.says(CAPTURED, DIGEST)
        for each in (agent, other):
            each.has("tenant", "chat", DIGEST)
        await until(lambda: nodes_of(world) == {"n1": "memory", "n2": "memory"})
        await until(lambda: world.condition("Ready") == ("True", "Resident", "on 2 node(s)"))
        await serving.aclose()
        await until(lambda: nodes_of(world) == {"n1": "memory", "n2": "unknown"})
        assert world.condition("Ready") == ("True", "Resident", "on 2 node(s), of which n2 is not heard of")


def nodes_of(world: World) -> dict[str, str]:
    return {each["name"]: each["rung"] for each in world.status().get("locations", [])}


async def test_a_conflict_is_looked_at_again(world: World) -> None:
    for _ in range(3):
        world.api.refuse.append(("PATCH", "modelsnapshots", 409, "the object has been modified"))
    world.api.refuse.append(("POST", "/pods", 500, "etcdserver: request timed out"))
    await world.snapshot()
    await world.says(CAPTURED, DIGEST)
    await until(lambda: world.status().get("digest") == DIGEST)


async def test_a_secret_that_changes_is_captured_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.kubernetes.controller._CONTENTS_SECONDS", 0.1)
    key = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "api"}}}
    engine = {"name": "engine", "image": "engine:1", "env": [key]}
    await world.api.put("secrets", {"metadata": {"name": "keys", "namespace": "tenant"}, "data": {"api": "b25l"}})
    await world.snapshot(template={"spec": {"containers": [engine]}})
    await world.says(CAPTURED, DIGEST)
    world.agents["n0"].has("tenant", "chat", DIGEST)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    assert world.condition("StaleEnvironment")[:2] == ("True", "Implicit")
    await world.api.change("secrets", "tenant", "keys", {"data": {"api": "dHdv"}})
    await until(world.pods)
    await until(lambda: world.status().get("phase") == "Capturing")
    first = world.pods()[0]["metadata"]["uid"]
    await world.api.change("secrets", "tenant", "keys", {"data": {"api": "dGhyZWU="}})
    await until(lambda: world.pods() and world.pods()[0]["metadata"]["uid"] != first)  # that one has the old one in its environment
    await world.says(CAPTURED, OTHER)
    world.agents["n0"].has("tenant", "chat", OTHER)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    assert world.status()["digest"] == OTHER


async def test_a_template_that_names_its_own_pod_is_refused_until_that_is_allowed(world: World) -> None:
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    await world.snapshot(template={"spec": {"containers": [{"name": "engine", "image": "engine:1", "env": [address]}]}})
    await until(lambda: world.condition("Captured")[1] == "TemplateRefused")
    assert "POD_IP (status.podIP)" in world.condition("Ready")[2] and not world.pods()
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"staleEnvironment": "allowed"}})
    await until(world.pods)
    assert world.pods()[0]["metadata"]["annotations"]["zerowake.dev/stale-environment"] == "allowed"


@pytest.mark.parametrize("digest", [DIGEST, ""])
async def test_a_damaged_snapshot_is_captured_again_at_once_and_then_less_often(world: World, digest: str) -> None:
    """One whose chunks are other ones, and one whose manifest cannot be read, so that nobody knows its digest."""
    await world.snapshot()
    await world.says(CAPTURED, DIGEST)
    world.agents["n0"].has("tenant", "chat", DIGEST)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    world.agents["n0"].has("tenant", "chat", digest, unusable="a chunk is missing")
    await until(world.pods)
    await until(lambda: "SnapshotDamaged" in world.reasons())
    notes = [each["note"] for each in world.api.all("events") if each["reason"] == "SnapshotDamaged"]
    assert notes == ["on node n0: a chunk is missing; it is captured again"]
    await world.says(CAPTURED, OTHER)
    world.agents["n0"].has("tenant", "chat", OTHER)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    world.agents["n0"].has("tenant", "chat", OTHER, unusable="a chunk is missing")
    await until(lambda: world.condition("Ready")[1] == "Unusable")
    await until(world.pods)  # 0.3 s after the first


async def test_a_damaged_snapshot_that_was_adopted_says_so(world: World) -> None:
    await world.snapshot(artifact={"name": "theirs", "digest": DIGEST})
    world.agents["n0"].has("tenant", "theirs", DIGEST)
    await until(lambda: world.status().get("phase") == "Ready")
    world.agents["n0"].has("tenant", "theirs", "", unusable="its manifest was changed")
    await until(lambda: world.condition("Ready") == ("False", "Unusable", "on node n0: its manifest was changed"))
    assert not world.pods()


async def test_how_many_of_its_pods_sleep_is_in_its_status(world: World) -> None:
    agent = await world.node("n1")
    agent.has("tenant", "chat", DIGEST)
    await world.snapshot(artifact={"name": "chat", "digest": DIGEST})
    await until(lambda: world.status().get("phase") == "Ready")
    assert not world.status().get("asleep")
    agent.runs("one", "chat", "tenant", agent_pb2.RUNG_PARKED)
    agent.runs("two", "chat", "tenant", agent_pb2.RUNG_STANDBY)
    agent.runs("three", "chat", "tenant")
    agent.runs("four", "chat", "another", agent_pb2.RUNG_STANDBY)
    await until(lambda: world.status().get("asleep") == 2)
    agent.runs("one", "chat", "tenant")
    agent.runs("two", "chat", "tenant")
    await until(lambda: not world.status().get("asleep"))


async def test_what_the_leader_does_beside_is_done_by_one_and_goes_on_with_the_next(without_agents: World) -> None:
    world = without_agents
    await world.step_down()
    doing: list[str] = []

    def candidate(name: str) -> asyncio.Task[None]:
        async def also() -> None:
            doing.append(name)
            try:
                await asyncio.Event().wait()
            finally:
                doing.remove(name)

        work = run_controller(
            world.cluster,
            world.informer,
            world.nodes,
            NodeSetup(),
            labelled=world.labelled,
            names=world.names,
            unmatched=Unmatched(world.cluster, world.models),
            refusals=Refusals(world.cluster, world.informer),
            sources=world.conditions,
            namespace="zerowake",
            identity=name,
            also=also,
        )
        return asyncio.create_task(work)

    first = candidate("first")
    await until(lambda: doing == ["first"])
    second = candidate("second")
    await world.snapshot()
    await until(lambda: world.condition("Captured")[1] == "NoAgent")
    assert doing == ["first"]
    first.cancel()
    await until(lambda: doing == ["second"])
    second.cancel()
    await asyncio.wait((first, second))
    assert doing == []
    await world.lead()  # as the test began
