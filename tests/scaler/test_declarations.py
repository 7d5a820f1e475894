"""Who declares a model, and whose it is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.books.trigger import Trigger
from scaler.kubernetes.declarations import Models, in_memory_all_the_same, planned
from scaler.kubernetes.resources import Condition, Status
from scaler.plan.rungs import Rung
from scaler.plan.world import Model
from tests.worlds.declared import Informer, declared_object, declared_snapshot


class World:
    def __init__(self) -> None:
        self.ledger = Ledger()
        self.models = Models(self.ledger)
        self.snapshots, self.scaled = Informer(), Informer()
        self.models.follow(self.snapshots, self.scaled)
        self.triggers: list[Trigger] = []
        self.passed: list[str] = []
        self.models.on_trigger(self.triggers.append)
        self.models.on_owner(self.passed.append)

    def snapshot(self, key: str, born: int, model: str = "m", **spec: Any) -> None:
        self.snapshots.put(declared_snapshot(key, born, model, **spec))

    def object(self, key: str, born: int, model: str = "m", **metadata: str) -> None:
        self.scaled.put(declared_object(key, born, model, **metadata))


@pytest.fixture
def world() -> World:
    return World()


def test_a_snapshot_declares_its_model_with_its_limits(world: World) -> None:
    world.snapshot("ns/a", 1, limits={"concurrency": 3, "maxWaitSeconds": 9, "maxRequests": 7}, stage="disk")
    assert world.ledger.limits("m") == ModelLimits(concurrency=3, max_wait_seconds=9, max_requests=7)
    assert world.models.planned["m"] == Model("m", SnapshotName("ns", "a"), stage=Rung.DISK, digest="")
    world.snapshots.drop("ns/a")
    assert (list(world.ledger.models()), world.models.planned, world.models.owner("m")) == ([], {}, "")


@pytest.mark.parametrize("stage", ["standby", "parked"])
def test_a_rung_that_no_pod_could_take_over_counts_as_memory_and_is_said(stage: str) -> None:
    asked, memory = (declared_snapshot("ns/a", 1, "m", stage=each) for each in (stage, "memory"))
    assert planned(asked) == planned(memory) == Model("m", SnapshotName("ns", "a"), stage=Rung.MEMORY, digest="")
    assert f"spec.stage: {stage} counts as memory" in in_memory_all_the_same(asked) and in_memory_all_the_same(memory) == ""


def test_only_what_is_ready_may_be_fetched_to_another_node() -> None:
    artifact = {"name": "chat", "digest": "ab" * 32}
    asked = declared_snapshot("ns/a", 1, "m", artifact=artifact)
    ready = Status(digest="ab" * 32, conditions=(Condition("Ready", "True"),))
    assert planned(asked).digest == "", "it may not be what its owner asked for"
    assert planned(msgspec.structs.replace(asked, status=ready)).digest == "ab" * 32


def test_a_trigger_declares_its_model_too(world: World) -> None:
    world.object("ns/so", 1, maxStageSeconds="4")
    assert world.ledger.limits("m") == ModelLimits()
    assert world.triggers == [Trigger("m", 8.0, 4.0)]
    assert [each.key for each in world.models.objects("m")] == [("ns", "so")]
    world.snapshot("ns/a", 2, limits={"concurrency": 3})
    assert world.ledger.limits("m").concurrency == 3
    world.snapshots.drop("ns/a")
    assert world.ledger.limits("m") == ModelLimits()
    world.scaled.drop("ns/so")
    assert not world.ledger.knows("m")


def test_an_object_that_names_another_model_now(world: World) -> None:
    world.object("ns/so", 1)
    world.object("ns/so", 1, model="other")
    assert list(world.ledger.models()) == ["other"]
    assert world.passed == ["m", "m", "other"]


@pytest.mark.parametrize("name", [" m ", "m\n", "a\tb"])
def test_a_name_that_no_model_can_have_declares_nothing(world: World, name: str) -> None:
    """A schema that was installed before may let it pass."""
    world.snapshot("ns/a", 1, model=name)
    world.object("ns/so", 2, model=name)
    assert (list(world.ledger.models()), world.models.planned) == ([], {})
    world.snapshot("ns/a", 1, model="m")
    assert list(world.ledger.models()) == ["m"]
    world.snapshots.drop("ns/a")
    assert list(world.ledger.models()) == []


def test_a_trigger_that_cannot_be_used_declares_nothing(world: World) -> None:
    world.object("ns/so", 1, targetPending="none")
    assert (list(world.ledger.models()), world.triggers) == ([], [])
    world.object("ns/so", 1)
    assert list(world.ledger.models()) == ["m"]


def test_a_model_is_the_oldest_namespaces(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.snapshot("tenant/a", 5, limits={"concurrency": 3})
    world.snapshot("hostile/a", 6, limits={"concurrency": 99})
    world.object("hostile/so", 7, maxStageSeconds="1")
    assert world.models.owner("m") == "tenant"
    assert "ModelSnapshot hostile/a names the model m, which is namespace tenant's already" in caplog.text
    assert (world.ledger.limits("m").concurrency, world.triggers, list(world.models.objects("m"))) == (3, [], [])
    world.snapshots.drop("tenant/a")  # given up
    assert (world.models.owner("m"), world.ledger.limits("m").concurrency) == ("hostile", 99)
    assert world.passed == ["m", "m"]


def test_an_object_that_names_another_namespaces_model_is_told_of_once(world: World) -> None:
    told: list[str] = []
    world.models.on_taken(lambda declaration: told.append(f"{type(declaration).__name__} {'/'.join(declaration.key)}"))

    def taken() -> list[str]:
        return sorted("/".join(each.declaration.key) for each in world.models.taken)

    world.object("tenant/so", 1)
    world.object("other/so", 2)
    world.snapshot("other/a", 3)
    assert (told, taken()) == (["ScaledObject other/so", "ModelSnapshot other/a"], ["other/a", "other/so"])
    world.object("other/so", 2)  # written again, as it is
    assert (told[2:], taken()) == ([], ["other/a", "other/so"])
    world.snapshot("other/a", 3, model="its own")
    assert taken() == ["other/so"]
    world.scaled.drop("tenant/so")
    assert (told[2:], taken()) == (["ScaledObject other/so"], [])
    assert world.models.taken_by(world.scaled.objects["other/so"]) is None


@pytest.mark.parametrize(("idle", "rung"), [("drop", None), ("standby", Rung.STANDBY), ("parked", Rung.PARKED)])
def test_what_becomes_of_replicas_that_nobody_asks(idle: str, rung: Rung | None) -> None:
    found = planned(declared_snapshot("ns/a", 1, "m", idle=idle, idleSeconds=7))
    assert (found.idle, found.idle_seconds) == (rung, 7.0)
    assert planned(declared_snapshot("ns/a", 1, "m")).idle is None, "unless it is asked for they keep what they have"


def test_a_snapshot_that_is_being_deleted_is_not_staged_any_more(world: World) -> None:
    world.snapshot("ns/a", 1)
    deleting = world.snapshots.objects["ns/a"]
    metadata = msgspec.structs.replace(deleting.metadata, deletion_timestamp="2026-01-01T00:01:00Z")
    world.snapshots.put(msgspec.structs.replace(deleting, metadata=metadata))
    assert (world.models.planned, world.ledger.knows("m")) == ({}, True)


def test_a_resync_changes_nothing(world: World) -> None:
    world.snapshot("ns/a", 1)
    declared: list[str] = []
    world.ledger.on_declaration(declared.append)
    world.snapshots.put(world.snapshots.objects["ns/a"])
    assert (declared, world.passed) == ([], ["m"])


def test_other_names_lead_to_the_model_and_are_taken_from_nobody(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.snapshot("a/base", 1, model="base", names=["sql", "chat"])
    assert [world.ledger.named(name) for name in ("base", "sql", "chat")] == ["base"] * 3
    assert world.ledger.models() == ["base"]
    world.snapshot("b/chat", 2, model="chat", names=["sql", "base", " x"])
    assert [world.ledger.named(name) for name in ("base", "sql", "chat", " x")] == ["base", "base", "chat", ""]
    assert "chat is to be called sql as well, which is base already" in caplog.text
    world.snapshot("a/base", 1, model="base", names=[])
    assert world.ledger.named("sql") == "chat"
    world.snapshots.drop("b/chat")
    assert world.ledger.named("sql") == ""


@pytest.mark.parametrize(("spec", "rung"), [({}, Rung.ABSENT), ({"pin": "disk"}, Rung.DISK), ({"pin": "memory"}, Rung.MEMORY)])
def test_what_its_owner_pins(spec: dict[str, str], rung: Rung) -> None:
    assert planned(declared_snapshot("ns/a", 1, "m", **spec)).pin is rung


def test_a_pin_that_changes_is_told_and_nothing_else_is(world: World) -> None:
    told: list[SnapshotName] = []
    world.models.on_keep(told.append)
    world.snapshot("ns/a", 1)
    world.snapshot("ns/a", 1, stage="disk")
    assert told == []
    world.snapshot("ns/a", 1, pin="memory")
    world.snapshot("ns/a", 1, pin="memory", stage="disk")
    assert told == [SnapshotName("ns", "a")]
    assert world.models.planned["m"].pin is Rung.MEMORY, "as it is when it is told"
    world.snapshot("ns/a", 1, pin="disk")
    world.snapshot("ns/a", 1)
    assert told == [SnapshotName("ns", "a")] * 3
    world.snapshot("ns/a", 1, pin="disk")
    world.snapshots.drop("ns/a")
    assert told == [SnapshotName("ns", "a")] * 5


def test_how_many_copies_are_kept_and_of_what_is_told(world: World) -> None:
    told: list[tuple[SnapshotName, int]] = []
    world.models.on_keep(lambda name: told.append((name, world.models.planned["m"].copies)))
    world.snapshot("ns/a", 1)
    world.snapshot("ns/a", 1, copies=2)
    assert told == [(SnapshotName("ns", "a"), 2)], "as it is when it is told"
    world.snapshot("ns/a", 1, copies=2, stage="disk")
    assert len(told) == 1
    world.snapshot("ns/a", 1, copies=3)
    world.snapshot("ns/a", 1)
    assert [copies for _, copies in told] == [2, 3, 1]


def test_sources_that_change_are_told_and_nothing_else_is(world: World) -> None:
    told: list[str] = []
    world.models.on_sources(told.append)
    cron = {"type": "cron"}
    world.snapshot("ns/a", 1)
    world.snapshot("ns/a", 1, stage="disk")
    assert (told, world.models.with_sources("m")) == ([], None)
    world.snapshot("ns/a", 1, sources=[cron])
    world.snapshot("ns/a", 1, sources=[cron], stage="disk")
    assert told == ["m"]
    found = world.models.with_sources("m")
    assert found and (found.key, found.spec.sources) == (("ns", "a"), (cron,))
    world.snapshot("ns/a", 1, sources=[cron, cron])
    world.snapshot("other/a", 2, sources=[cron])
    assert told == ["m"] * 2, "another namespace's do not count"
    world.snapshots.drop("ns/a")
    found = world.models.with_sources("m")
    assert told == ["m"] * 3 and found and found.key == ("other", "a")
    world.snapshots.drop("other/a")
    assert (told, world.models.with_sources("m")) == (["m"] * 4, None)
