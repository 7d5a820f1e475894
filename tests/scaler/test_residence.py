"""What an object's status says of where its artifact is, as far as no other test of the controller is about it."""

from zerowake_proto import agent_pb2

from scaler.plan.scheduling import Standing
from tests.worlds.controlled import DIGEST, TEMPLATE, World
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import CAPTURED


async def test_whether_there_are_as_many_copies_as_are_wanted(world: World) -> None:
    one, two = world.agents["n0"], await world.node("n1")
    one.has("tenant", "chat", DIGEST)
    await world.snapshot(artifact={"name": "chat", "digest": DIGEST}, copies=2)
    await until(lambda: world.condition("Copied")[2].startswith("1 of 2 copies stand where they count; node n1: "))
    assert world.condition("Copied")[:2] == ("False", "TooFew") and world.condition("Ready")[0] == "True"
    two.has("tenant", "chat", DIGEST)
    await until(lambda: world.condition("Copied") == ("True", "Copied", ""))
    world.nodes.place("n1", Standing(cordoned=True))
    await until(lambda: world.condition("Copied")[2] == "1 of 2 copies stand where they count; node n1: it is cordoned")
    assert {each["name"] for each in world.status()["locations"]} == {"n0", "n1"}, "it keeps what it has"
    world.nodes.place("n1", None)
    await until(lambda: world.condition("Copied") == ("True", "Copied", ""))
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"copies": 1}})
    await until(lambda: world.condition("Copied") == ("", "", ""))


async def test_a_model_is_not_ready_before_its_capture_pod_has_left_its_room(world: World) -> None:
    """What that pod asks for counts on its node until it has ended: a pod that is made as the model gets Ready has to fit there."""
    await world.snapshot(template=TEMPLATE)
    await until(world.pods)
    name = world.pods()[0]["metadata"]["name"]
    await world.api.change("pods", "tenant", name, {"metadata": {"finalizers": ["test/stays"]}})
    world.agents["n0"].has("tenant", "chat", DIGEST)
    await world.says(CAPTURED, DIGEST)
    await until(lambda: world.condition("Ready")[:2] == ("False", "CapturePodEnding"))
    assert f"pod {name}, in which that was done, has its room" in world.condition("Ready")[2]
    assert world.status()["phase"] == "Capturing" and world.condition("Captured")[0] == "True"
    await until(lambda: world.pods()[0]["metadata"].get("deletionTimestamp"))
    found = world.informer.get("tenant", "chat")
    assert found and found.ready_digest == DIGEST, "a pod that is made all the same is restored where there is room"
    await world.api.change("pods", "tenant", name, {"status": {"phase": "Succeeded"}})
    await until(lambda: world.condition("Ready") == ("True", "Resident", "on 1 node(s)"))
    assert world.status()["phase"] == "Ready"
    await world.api.change("pods", "tenant", name, {"metadata": {"finalizers": []}})
    await until(lambda: not world.pods())
    assert world.condition("Ready")[0] == "True"


async def test_where_it_is_staged_is_told_as_it_climbs_and_not_as_it_falls(world: World) -> None:
    one, two = world.agents["n0"], await world.node("n1")
    one.has("tenant", "chat", DIGEST, rung=agent_pb2.RUNG_DISK)
    await world.snapshot(artifact={"name": "chat", "digest": DIGEST})

    def rungs() -> dict[str, str]:
        return {each["name"]: each["rung"] for each in world.status().get("locations", [])}

    def told() -> list[str]:
        return [each["note"] for each in world.api.all("events") if each["reason"] == "Staged"]

    await until(lambda: rungs() == {"n0": "disk"})
    assert told() == [], "where it is at first is told by the condition"
    one.has("tenant", "chat", DIGEST, rung=agent_pb2.RUNG_MEMORY)
    await until(lambda: told() == ["node n0: from disk to memory"])
    one.has("tenant", "chat", DIGEST, rung=agent_pb2.RUNG_DISK)
    await until(lambda: rungs() == {"n0": "disk"})
    two.has("tenant", "chat", DIGEST, rung=agent_pb2.RUNG_DISK)
    await until(lambda: told() == ["node n0: from disk to memory", "node n1: to disk"])
