"""What agents refused to fetch or to stage, as events of the ModelSnapshot."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from scaler.books.snapshot_name import SnapshotName
from scaler.kubernetes.refusals import Refusals
from scaler.kubernetes.resources import ModelSnapshot
from scaler.plan.actions import Stage
from scaler.plan.rungs import Rung
from tests.worlds.declared import declared_snapshot
from tests.worlds.waiting import until
from zerowake_shared.kubernetes.resource import Resource

FETCH = Stage("10.0.0.1:9446", "m", SnapshotName("tenant", "chat"), "d", Rung.DISK, "no node that has it can restore it")
UNTRUSTED = "the snapshot is signed by key 1234, which this node does not trust"


class World:
    """A cluster's events, and its ModelSnapshots."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.snapshots = {("tenant", "chat"): declared_snapshot("tenant/chat", 1)}

    async def event(self, about: Resource, metadata: Any, kind: str, reason: str, note: str, action: str) -> None:
        assert (about.kind, kind, action) == ("ModelSnapshot", "Warning", "Stage")
        self.events.append((metadata.name, reason, note))

    def get(self, namespace: str, name: str) -> ModelSnapshot | None:
        return self.snapshots.get((namespace, name))


async def test_each_is_told_once_until_it_is_another() -> None:
    world = World()
    refusals = Refusals(world, world)
    leading = asyncio.create_task(refusals.run())
    await asyncio.sleep(0)
    for why in (UNTRUSTED, UNTRUSTED, "the store denies it", UNTRUSTED):
        refusals.refused(FETCH, "gpu-1", why)
    refusals.refused(FETCH, "gpu-2", UNTRUSTED)
    refusals.refused(replace(FETCH, rung=Rung.MEMORY), "gpu-1", "no memory")
    refusals.refused(replace(FETCH, snapshot=SnapshotName("tenant", "gone")), "gpu-1", UNTRUSTED)
    refusals.refused(replace(FETCH, digest="e"), "gpu-1", UNTRUSTED)
    refusals.complained(FETCH, "gpu-1", UNTRUSTED)
    await until(lambda: len(world.events) == 7)
    assert world.events == [
        ("chat", "NotFetched", f"node gpu-1: {UNTRUSTED}"),
        ("chat", "NotFetched", "node gpu-1: the store denies it"),
        ("chat", "NotFetched", f"node gpu-1: {UNTRUSTED}"),
        ("chat", "NotFetched", f"node gpu-2: {UNTRUSTED}"),
        ("chat", "NotStaged", "node gpu-1: no memory"),
        ("chat", "NotFetched", f"node gpu-1: {UNTRUSTED}"),
        ("chat", "SourceLeft", f"node gpu-1: {UNTRUSTED}"),
    ]
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)


async def test_who_does_not_lead_tells_and_keeps_nothing() -> None:
    world = World()
    refusals = Refusals(world, world)
    refusals.refused(FETCH, "gpu-1", UNTRUSTED)
    leading = asyncio.create_task(refusals.run())
    await asyncio.sleep(0)
    refusals.refused(FETCH, "gpu-1", "the store denies it")
    await until(lambda: world.events)
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
    refusals.refused(FETCH, "gpu-1", UNTRUSTED)
    leading = asyncio.create_task(refusals.run())
    await asyncio.sleep(0)
    refusals.refused(FETCH, "gpu-1", "it is full")
    await until(lambda: len(world.events) > 1)
    assert [note for _, _, note in world.events] == ["node gpu-1: the store denies it", "node gpu-1: it is full"]
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
