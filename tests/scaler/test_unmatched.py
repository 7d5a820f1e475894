"""Events about ScaledObjects whose model has no ModelSnapshot."""

from __future__ import annotations

import asyncio
from typing import Any

from scaler.books.ledger import Ledger
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.unmatched import Unmatched
from tests.worlds import virtual_time
from tests.worlds.declared import Informer, declared_object, declared_snapshot
from zerowake_shared.kubernetes.resource import Resource


class Events:
    def __init__(self) -> None:
        self.written: list[tuple[str, str]] = []

    async def event(self, about: Resource, metadata: Any, kind: str, reason: str, note: str, action: str) -> None:
        assert (about.kind, kind, reason) == ("ScaledObject", "Warning", "NoModelSnapshot")
        self.written.append((metadata.name, note))


def test_each_is_told_once_and_not_while_the_rest_of_a_file_is_applied() -> None:
    async def day() -> None:
        models, events, snapshots, objects = Models(Ledger()), Events(), Informer(), Informer()
        models.follow(snapshots, objects)
        leading = asyncio.create_task(Unmatched(events, models).run())
        await asyncio.sleep(9)
        objects.put(declared_object("tenant/first", 2, model="smol"))
        await asyncio.sleep(2)
        snapshots.put(declared_snapshot("tenant/chat", 3, model="smol"))
        objects.put(declared_object("tenant/second", 4, model="smoll"))
        objects.put(declared_object("other/alone", 4, model="alone"))
        await asyncio.sleep(60)
        note = "no ModelSnapshot of namespace tenant is of the model 'smoll': its pods start cold; did you mean 'smol'?"
        alone = "no ModelSnapshot of namespace other is of the model 'alone': its pods start cold"
        assert sorted(events.written) == [("alone", alone), ("second", note)]
        snapshots.drop("tenant/chat")
        await asyncio.sleep(60)
        assert "first" in [name for name, _ in events.written], "it has none any more"
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)

    virtual_time.run(day())
