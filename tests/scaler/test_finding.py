"""A new ModelSnapshot whose store may have its snapshot: when that is taken, and when one is captured all the same."""

from __future__ import annotations

from typing import Any

import pytest
from zerowake_proto import agent_pb2

from scaler.kubernetes import finding
from scaler.kubernetes.declarations import planned
from scaler.plan.world import Stored
from tests.worlds.controlled import DIGEST, OTHER, TEMPLATE, World
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import CAPTURED, CONTENTS
from zerowake_shared.pod_contract import TEMPLATE as TEMPLATE_HASH

STORE = "s3://bucket/models"


async def hash_of(world: World, template: dict[str, Any]) -> str:
    """As another controller made it of that template, and its capture pod had it."""
    await world.snapshot("other", template=template, model="other-model")
    await until(world.pods)
    (pod,) = world.pods()
    found = world.informer.get("tenant", "other")
    assert found and pod["metadata"]["annotations"][TEMPLATE_HASH] == found.template_hash
    await world.api.remove("modelsnapshots", "tenant", "other")
    await until(lambda: world.informer.get("tenant", "other") is None)
    await world.api.remove("pods", "tenant", pod["metadata"]["name"])
    return str(found.template_hash)


def kept(template: str, contents: str = "") -> agent_pb2.FindResponse:
    reference = agent_pb2.SnapshotRef(namespace="tenant", name="chat", digest=DIGEST)
    sizes = {"image_bytes": 7, "weights_bytes": 3, "gpu_bytes": [5]}
    return agent_pb2.FindResponse(snapshot=reference, template_hash=template, contents_hash=contents, **sizes)


def in_store(world: World, template: str, contents: str = "") -> None:
    for agent in world.agents.values():
        agent.in_store, agent.find_fails = kept(template, contents), None


def notes(world: World, reason: str) -> list[str]:
    return [each["note"] for each in world.api.all("events") if each["reason"] == reason]


def captured_pods(world: World) -> list[str]:
    return [pod["metadata"]["name"] for pod in world.pods() if pod["metadata"]["name"].startswith("chat-capture-")]


async def test_what_its_store_has_is_fetched_and_not_captured(world: World) -> None:
    agent = world.agents["n0"]
    in_store(world, await hash_of(world, TEMPLATE))
    agent.find_opens.clear()
    await world.snapshot(template=TEMPLATE, store=STORE, model="other-model")
    await until(lambda: world.condition("Captured")[:2] == ("False", "AskingStore"))
    assert world.condition("Ready")[2] == f"node n0 asks {STORE} whether it has tenant/chat" and world.status()["phase"] == "Pending"
    agent.find_opens.set()
    await until(lambda: world.status().get("phase") == "Ready")
    assert [(each.snapshot.name, each.store) for each in agent.asked] == [("chat", STORE)]
    assert (agent.staged[0].snapshot.digest, list(agent.staged[0].stores)) == (DIGEST, [STORE])
    assert world.status()["digest"] == DIGEST and world.condition("Captured")[0] == world.condition("Stored")[0] == "True"
    assert [each["name"] for each in world.status()["locations"]] == ["n0", STORE]
    assert notes(world, "Found") == [
        f"{DIGEST[:12]} was found in {STORE}, of this template and signed by a trusted key: it is fetched, not captured"
    ]
    assert not captured_pods(world) and not agent.pushed


async def test_what_is_told_of_it_before_a_node_has_it(world: World) -> None:
    agent = world.agents["n0"]
    in_store(world, await hash_of(world, TEMPLATE))
    await world.snapshot(template=TEMPLATE, store=STORE, model="other-model")
    found = None

    def is_taken() -> bool:
        nonlocal found
        found = world.informer.get("tenant", "chat")
        return bool(found and found.status.digest)

    await until(is_taken)
    assert found and planned(found).stored == Stored(STORE, DIGEST, 7, 3, (5,))
    await until(lambda: agent.staged)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"template": "aaaaaaaaaa"}, "captured from another template (aaaaaaaaaa, and this one is"),
        ({"template": ""}, "and nothing says which template it was captured from"),
        ({"contents": "0123"}, "captured with other ConfigMaps or Secrets behind its environment"),
    ],
)
async def test_what_is_of_something_else_is_captured_and_that_is_told(world: World, change: dict[str, str], why: str) -> None:
    in_store(world, **({"template": await hash_of(world, TEMPLATE)} | change))
    await world.snapshot(template=TEMPLATE, store=STORE, model="other-model")
    await until(lambda: captured_pods(world))
    (note,) = notes(world, "NotAdopted")
    assert note.startswith(f"{STORE} has {DIGEST[:12]} of that name, {why}") and note.endswith(": it is captured")
    assert world.pods()[0]["metadata"]["annotations"][CONTENTS] == ""
    await world.says(CAPTURED, OTHER)
    await until(lambda: world.status().get("digest") == OTHER)
    assert len(world.agents["n0"].asked) == 1


async def test_what_nobody_trusts_is_captured_and_a_store_that_plainly_has_none_is_not_spoken_of(world: World) -> None:
    world.agents["n0"].find_fails = ("untrusted", "signed by a key that is not trusted here")
    await world.snapshot(template=TEMPLATE, store=STORE)
    await until(lambda: captured_pods(world))
    assert notes(world, "NotAdopted") == [
        f"what {STORE} has as tenant/chat is of no use here: signed by a key that is not trusted here; it is captured"
    ]
    world.agents["n0"].find_fails = ("not-in-store", "no such snapshot there")
    await world.snapshot("plain", template=TEMPLATE, store=STORE)
    await until(lambda: len(world.pods()) == 2)
    assert len(notes(world, "NotAdopted")) == 1 and not notes(world, "Found")


async def test_denied_is_not_absent_another_agent_is_asked_and_then_it_is_taken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "_FIRST_RETRY_SECONDS", 0.2)
    other = await world.node("n1")
    template = await hash_of(world, TEMPLATE)
    for agent in world.agents.values():
        agent.find_fails = ("denied", "403 Forbidden")
    await world.snapshot(template=TEMPLATE, store=STORE, model="other-model")
    await until(lambda: world.condition("Captured")[1] == "StoreDenied")
    said = world.condition("Captured")[2]
    assert f"could not ask {STORE}: 403 Forbidden; it is captured if that stays so for 60 s" in said and not captured_pods(world)
    await until(lambda: world.agents["n0"].asked and other.asked)
    in_store(world, template)
    await until(lambda: world.status().get("phase") == "Ready")
    assert not captured_pods(world) and world.status()["digest"] == DIGEST


async def test_a_store_that_is_away_for_long_costs_a_capture_and_no_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "_FIRST_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(finding, "PATIENCE_SECONDS", 0.5)
    world.agents["n0"].find_fails = ("unreachable", "no route to host")
    await world.snapshot(template=TEMPLATE, store=STORE)
    await until(lambda: captured_pods(world))
    assert notes(world, "StoreUnreachable") == [f"node n0 could not ask {STORE}: no route to host, for 0.5 s: it is captured"]
    assert len(world.agents["n0"].asked) > 1


async def test_what_no_node_can_fetch_is_captured(world: World) -> None:
    in_store(world, await hash_of(world, TEMPLATE))
    world.agents["n0"].store_fails = ("incompatible", "another kernel")
    await world.snapshot(template=TEMPLATE, store=STORE, model="other-model")
    await until(lambda: captured_pods(world))
    assert "another kernel" in notes(world, "NotFetched")[0] and len(world.agents["n0"].asked) == 1


async def test_one_that_is_made_anew_is_looked_for_anew(world: World) -> None:
    template = await hash_of(world, TEMPLATE)
    await world.snapshot(template=TEMPLATE, store=STORE, model="other-model")
    await world.says(CAPTURED, DIGEST)
    world.agents["n0"].has("tenant", "chat", DIGEST)
    await until(lambda: world.condition("Stored")[0] == "True" and not world.pods())
    in_store(world, template)
    await world.api.change("modelsnapshots", "tenant", "chat", {"metadata": {"deletionTimestamp": "2026-11-22T06:00:00Z"}})
    await until(lambda: world.api.get("modelsnapshots", "tenant", "chat") is None and not world.agents["n0"].residencies)
    await world.snapshot(template=TEMPLATE, store=STORE, model="other-model")
    await until(lambda: world.status().get("phase") == "Ready")
    assert len(world.agents["n0"].asked) == 2 and not captured_pods(world)
