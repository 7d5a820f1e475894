"""Pods that started cold, by their snapshot: which count, what is told of them, and that other snapshots' pods are not looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from scaler.kubernetes.cold_starts import ColdStarts
from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.resources import CONDITION_READY, ModelSnapshot
from tests.worlds.virtual_time import StandingClock
from zerowake_shared.pod_contract import CAPTURE, COLD, CONTAINER, RESTORE, SNAPSHOT

NOON = 1_800_000_000.0  # 2027-01-15T08:00:00Z


def pod(name: str, minute: int = 0, snapshot: str = "chat", uid: str = "", **about: Any) -> EnginePod:
    made = f"2027-01-15T08:{minute:02}:00Z"
    metadata = {"name": name, "namespace": "team", "uid": uid or name, "labels": {SNAPSHOT: snapshot}, "creationTimestamp": made}
    return msgspec.convert({"metadata": metadata | {"annotations": {CONTAINER: "engine"}} | about}, EnginePod)


def cold(name: str, minute: int = 0, why: str = "no agent", **about: Any) -> EnginePod:
    return pod(name, minute, annotations={COLD: why}, **about)


class World:
    """Pods that are told of one by one, and cannot be gone through."""

    def __init__(self) -> None:
        self.clock = StandingClock(NOON)
        self.events: list[tuple[str, str]] = []
        self._changed: Callable[[EnginePod | None, EnginePod | None], None]
        self._there: dict[str, EnginePod] = {}
        self.cold_starts = ColdStarts(self, self, self.clock)

    def on_change(self, callback: Callable[[EnginePod | None, EnginePod | None], None]) -> None:
        self._changed = callback

    async def event(self, about: object, metadata: Any, kind: str, reason: str, note: str, action: str) -> None:
        self.events.append((metadata.name, note))

    def come(self, *pods: EnginePod) -> None:
        for each in pods:
            self._changed(self._there.get(each.metadata.name), each)
            self._there[each.metadata.name] = each

    def go(self, name: str) -> None:
        self._changed(self._there.pop(name), None)

    def condition(self, name: str = "chat") -> tuple[str, str] | None:
        ready = {"type": CONDITION_READY, "status": "True", "lastTransitionTime": "2027-01-15T07:00:00Z"}
        told = {"metadata": {"name": name, "namespace": "team"}, "spec": {"template": {}}, "status": {"conditions": [ready]}}
        found = self.cold_starts.condition(msgspec.convert(told, ModelSnapshot))
        return found and (found.status, found.message)


@pytest.fixture
def world() -> World:
    return World()


def test_the_newest_pod_of_a_snapshot_counts(world: World) -> None:
    assert world.condition() is None
    world.come(pod("one", 1), cold("two", 2), cold("other", 3, snapshot="embed", why="another's"))
    assert world.condition() == ("False", "pod two started cold: no agent")
    world.come(cold("three", 4, "it is full"))
    assert world.condition() == ("False", "pod three started cold, and 1 more did: it is full")
    world.come(pod("four", 5))
    assert world.condition() == ("True", "")
    for name in ("four", "three"):
        world.go(name)
    assert world.condition() == ("False", "pod two started cold: no agent")
    world.go("two")
    world.go("one")
    assert world.condition() is None and world.condition("embed") == ("False", "pod other started cold: another's")


def test_a_pod_s_changes_are_followed(world: World) -> None:
    world.come(pod("one", 1))
    world.come(cold("one", 1))
    assert world.condition() == ("False", "pod one started cold: no agent")
    world.come(cold("one", 1, snapshot="embed"))
    assert world.condition() is None and world.condition("embed")


@pytest.mark.parametrize("about", [{"deletionTimestamp": "2027-01-15T08:00:00Z"}, {"annotations": {COLD: "why", RESTORE: "false"}}])
def test_pods_that_go_or_were_opted_out_do_not_count(world: World, about: dict[str, Any]) -> None:
    world.come(pod("one", 1, **about))
    assert world.condition() is None


async def test_a_pod_that_the_webhook_was_not_asked_about_has_started_cold(world: World) -> None:
    captured = pod("captured", 3, annotations={}, labels={SNAPSHOT: "chat", CAPTURE: "chat"})
    world.come(pod("one", 1), pod("missed", 2, annotations={}))
    why = "zerowake's webhook did not answer when it was made"
    assert world.condition() == ("False", f"pod missed started cold: {why}")
    world.come(captured)
    await world.cold_starts.tell(("team", "chat"))
    assert world.events == [("missed", f"its engine starts cold: {why}")]


async def test_each_pod_that_the_webhook_left_is_told_of_once(world: World) -> None:
    by_the_agent = pod("failed", annotations={COLD: "no memory", CONTAINER: "engine"})
    world.come(cold("one"), by_the_agent, cold("other", snapshot="embed"), pod("restored"))
    for _ in range(2):
        await world.cold_starts.tell(("team", "chat"))
    assert world.events == [("one", "its engine starts cold: no agent")], "the agent tells of its own"
    world.go("one")
    world.come(cold("one", uid="again"))  # a StatefulSet's
    await world.cold_starts.tell(("team", "chat"))
    assert world.events == [("one", "its engine starts cold: no agent")] * 2
    world.clock.moment += 301
    world.come(cold("late"))
    await world.cold_starts.tell(("team", "chat"))
    assert len(world.events) == 2, "whoever led then has told of it"
