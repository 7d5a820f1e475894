"""What a ModelSnapshot says of its sources, by a condition and events, under the controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaler.kubernetes.source_declarations import sources_of
from scaler.sources.push_declaration import PushDeclaration
from scaler.sources.source import Reading
from tests.worlds.controlled import TEMPLATE, World
from tests.worlds.ports import free_port
from tests.worlds.redis_server import redis_server
from tests.worlds.waiting import until


def a_list(port: int) -> dict[str, Any]:
    return {"type": "redis", "url": f"redis://127.0.0.1:{port}", "list": "jobs", "interval_seconds": 0.1}


async def declare(world: World, *sources: dict[str, Any]) -> None:
    await world.api.change("modelsnapshots", "tenant", "chat", {"spec": {"sources": list(sources)}})


def told(world: World, reason: str) -> list[str]:
    return [each["note"] for each in world.api.all("events") if each["reason"] == reason]


async def test_silent_then_heard_then_none(world: World, tmp_path: Path) -> None:
    await world.snapshot()
    await until(lambda: world.status().get("phase") == "Capturing")
    assert world.condition("Sources") == ("", "", "")
    port = free_port()
    await declare(world, a_list(port))
    await until(lambda: world.condition("Sources")[:2] == ("False", "Silent"))
    message = world.condition("Sources")[2]
    assert f"redis: list jobs at redis://127.0.0.1:{port} was not heard of: " in message and "fallback counts" in message
    await until(lambda: told(world, "SourceSilent"))
    with redis_server(tmp_path, port=port):
        await until(lambda: world.condition("Sources") == ("True", "Heard", ""))
    assert len(told(world, "SourceSilent")) == 1
    await declare(world)
    await until(lambda: world.condition("Sources") == ("", "", ""))
    assert world.status()["phase"] == "Capturing", "and nothing else has changed"


async def test_each_refusal_is_told(world: World, tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        await world.snapshot(template=TEMPLATE, sources=[a_list(redis.port), {**a_list(1), "url": "redis://10.0.0.1"}])
        await until(lambda: world.condition("Sources")[:2] == ("False", "Refused"))
        assert world.condition("Sources")[2].startswith("spec.sources[1].url: 10.0.0.1 is no Service of this namespace")
        await declare(world, a_list(redis.port), {**a_list(1), "url": "redis://10.0.0.2"})
        await until(lambda: "10.0.0.2 is no Service" in world.condition("Sources")[2])
        await until(lambda: len(told(world, "SourceRefused")) == 2)
        await declare(world, a_list(redis.port))
        await until(lambda: world.condition("Sources") == ("True", "Heard", ""))


async def test_a_new_leader_takes_back_nothing_that_was_said(world: World, tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        await world.snapshot(template=TEMPLATE, sources=[a_list(redis.port)])
        await until(lambda: world.condition("Sources") == ("True", "Heard", ""))
        await until(lambda: (found := world.informer.get("tenant", "chat")) is not None and found.status.holds("Sources"))
        found = world.informer.get("tenant", "chat")
        assert found
        world.sources.declare("chat", sources_of(found, {"127.0.0.1"}))
        assert world.conditions.of(found) == found.status.condition("Sources"), "it was not asked yet"


async def test_what_was_posted_and_is_over_is_silent(world: World) -> None:
    await world.snapshot(template=TEMPLATE, sources=[{"type": "push", "by": "b"}])
    await until(lambda: world.condition("Sources") == ("Unknown", "Asked", "push: what b post to /demand was not heard of"))
    assert world.sources.told("chat", PushDeclaration(type="push", by="b"), Reading(3), 1.0)
    await until(lambda: world.condition("Sources") == ("True", "Heard", ""))
    await until(lambda: world.condition("Sources")[:2] == ("False", "Silent"))


async def test_another_namespaces_sources_are_not_spoken_of(world: World) -> None:
    await world.snapshot(template=TEMPLATE, sources=[{**a_list(1), "url": "redis://10.0.0.1"}])
    await until(lambda: world.condition("Sources")[:2] == ("False", "Refused"))
    spec = {"template": TEMPLATE, "model": "chat", "sources": [a_list(1)]}
    await world.api.put(
        "modelsnapshots", {"metadata": {"name": "a", "namespace": "zother", "creationTimestamp": "2026-11-22T06:00:00Z"}, "spec": spec}
    )
    await until(lambda: (world.informer.get("zother", "a") or None) is not None)
    found = world.informer.get("zother", "a")
    assert found and world.conditions.of(found) is None
