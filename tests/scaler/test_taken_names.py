"""Events about names that are another namespace's."""

from __future__ import annotations

import asyncio
from typing import Any

from scaler.books.ledger import Ledger
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.taken_names import TakenNames
from tests.worlds.declared import Informer, declared_object, declared_snapshot
from tests.worlds.waiting import until
from zerowake_shared.kubernetes.resource import Resource


class Events:
    """Those that were written: about what, and what they say."""

    def __init__(self) -> None:
        self.written: list[tuple[str, str]] = []

    async def event(self, about: Resource, metadata: Any, kind: str, reason: str, note: str, action: str) -> None:
        assert (kind, reason) == ("Warning", "ModelNameTaken")
        self.written.append((f"{about.kind} {metadata.namespace}/{metadata.name}", note))


async def test_whoever_leads_tells_each_of_them_once() -> None:
    models, events, snapshots, objects = Models(Ledger()), Events(), Informer(), Informer()
    models.follow(snapshots, objects)
    names = TakenNames(events, models)
    snapshots.put(declared_snapshot("tenant/a", 1))
    objects.put(declared_object("other/so", 2))
    leading = asyncio.create_task(names.run())
    try:
        await until(lambda: events.written)
        why = "it names the model m, which is namespace tenant's already: it does not count; give the model another name"
        assert events.written == [("ScaledObject other/so", why)]
        foreign = declared_snapshot("other/a", 3)
        snapshots.put(foreign)
        objects.put(declared_object("other/so", 2))
        await until(lambda: len(events.written) > 1)
        assert events.written[1:] == [("ModelSnapshot other/a", why)]
        assert names.why(foreign) == why
        snapshots.put(declared_snapshot("other/a", 3, model="its own"))
        assert names.why(snapshots.objects["other/a"]) == ""
    finally:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
