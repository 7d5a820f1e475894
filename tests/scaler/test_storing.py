"""Snapshots that go into the store that their owner names: in the background, whatever the store does, and told where the owner looks."""

from scaler.kubernetes.resources import MODEL_SNAPSHOTS
from tests.worlds.controlled import DIGEST, OTHER, TEMPLATE, World
from tests.worlds.fake_agent import Agent
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import CAPTURED

STORE = "s3://bucket/models"


async def captured(world: World, digest: str = DIGEST, **spec: object) -> Agent:
    """On node n0, with a store."""
    await world.snapshot(template=TEMPLATE, store=STORE, **spec)
    await world.says(CAPTURED, digest)
    world.agents["n0"].has("tenant", "chat", digest, size=7)
    await until(lambda: world.status().get("phase") == "Ready" and not world.pods())
    return world.agents["n0"]


def stored(world: World) -> list[dict[str, str]]:
    return [each for each in world.status().get("locations", []) if each["rung"] == "store"]


async def test_what_was_captured_is_put_into_its_store_once(world: World) -> None:
    agent = await captured(world)
    await until(lambda: world.condition("Stored")[:2] == ("True", "Stored"))
    (location,) = stored(world)
    assert (location["name"], location["digest"]) == (STORE, DIGEST)
    assert world.condition("Stored")[2] == f"in {STORE} since {location['since']}"
    assert [(each.snapshot.name, each.snapshot.digest, each.store) for each in agent.pushed] == [("chat", DIGEST, STORE)]
    await until(lambda: "Stored" in world.reasons())
    await world.step_down()
    await world.lead()
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"stage": "disk"}})
    await until(lambda: world.status()["observedGeneration"] == 2)
    assert stored(world) == [location] and len(agent.pushed) == 1, "another leader knows that it is there"


async def test_a_model_is_ready_while_its_store_takes_its_time(world: World) -> None:
    world.agents["n0"].store_opens.clear()
    agent = await captured(world)
    await until(lambda: world.condition("Stored") == ("False", "Pushing", f"node n0 puts it into {STORE}"))
    await until(lambda: world.condition("Ready")[0] == "True")
    assert not stored(world)
    agent.store_opens.set()
    await until(lambda: world.condition("Stored")[0] == "True")


async def test_a_store_that_denies_is_told_and_tried_again(world: World) -> None:
    world.agents["n0"].store_fails = ("denied", "s3://bucket does not let us")
    agent = await captured(world)
    await until(lambda: world.condition("Stored")[:2] == ("False", "Denied"))
    assert world.condition("Stored")[2].startswith(f"node n0 could not put it into {STORE}: s3://bucket does not let us; it is tried")
    await until(lambda: world.condition("Ready")[0] == "True")
    await until(lambda: len(agent.pushed) == 2)
    await until(lambda: world.reasons().count("NotStored") == 1)
    agent.store_fails = ("store-full", "no room")
    await until(lambda: world.condition("Stored")[1] == "Full")
    agent.store_fails = None
    await until(lambda: world.condition("Stored")[0] == "True")
    assert world.reasons().count("NotStored") == 2, "one event a reason, not a try"


async def test_another_store_gets_it_and_none_is_none(world: World) -> None:
    agent = await captured(world)
    await until(lambda: world.condition("Stored")[0] == "True")
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"store": "file:///stores/a"}})
    await until(lambda: [each["name"] for each in stored(world)] == ["file:///stores/a"])
    assert [each.store for each in agent.pushed] == [STORE, "file:///stores/a"]
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"store": None}})
    await until(lambda: not stored(world) and world.condition("Stored") == ("", "", ""))
    await until(lambda: world.condition("Ready")[0] == "True")


async def test_a_new_capture_takes_the_place_of_the_old_one_there(world: World) -> None:
    agent = await captured(world)
    await until(lambda: world.condition("Stored")[0] == "True")
    newer = {"spec": {"containers": [{"name": "engine", "image": "engine:2"}]}}
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"template": newer}})
    await until(lambda: world.status().get("phase") == "Capturing")
    await world.says(CAPTURED, OTHER)
    agent.has("tenant", "chat", OTHER)
    await until(lambda: [each["digest"] for each in stored(world)] == [OTHER])


async def test_an_object_that_is_deleted_ends_its_push(world: World) -> None:
    world.agents["n0"].store_opens.clear()
    agent = await captured(world)
    await until(lambda: agent.pushed)
    await world.cluster.delete(MODEL_SNAPSHOTS, "tenant", "chat")
    await until(lambda: not world.api.all("modelsnapshots"))
    agent.store_opens.set()
    assert len(agent.pushed) == 1
