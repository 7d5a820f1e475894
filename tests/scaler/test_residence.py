"""What an object's status says of where its artifact is, as far as no other test of the controller is about it."""

from tests.worlds.controlled import DIGEST, World
from tests.worlds.waiting import until


async def test_whether_there_are_as_many_copies_as_are_wanted(world: World) -> None:
    one, two = world.agents["n0"], await world.node("n1")
    one.has("tenant", "chat", DIGEST)
    await world.snapshot(artifact={"name": "chat", "digest": DIGEST}, copies=2)
    await until(lambda: world.condition("Copied")[2].startswith("1 of 2 stand on nodes that are heard"))
    assert world.condition("Copied")[:2] == ("False", "TooFew") and world.condition("Ready")[0] == "True"
    two.has("tenant", "chat", DIGEST)
    await until(lambda: world.condition("Copied") == ("True", "Copied", ""))
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"copies": 1}})
    await until(lambda: world.condition("Copied") == ("", "", ""))
