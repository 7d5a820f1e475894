"""Whoever names a model that is another namespace's is told so, by an event of the object that does. The leader tells, once for each.

A ModelSnapshot's condition `Ready` says it as well (controller.py); a ScaledObject's status is KEDA's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from scaler.kubernetes.declarations import Models
from scaler.kubernetes.events import Events
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, SCALED_OBJECTS, ModelSnapshot

REASON = "ModelNameTaken"


class TakenNames:
    """Tells while `run` runs."""

    def __init__(self, events: Events, models: Models) -> None:
        self._events = events
        self._models = models
        self._news = asyncio.Event()
        models.on_taken(lambda _: self._news.set())

    def on_change(self, callback: Callable[[ModelSnapshot], None]) -> None:
        """Calls `callback(snapshot)` after the model that it names came to be another namespace's, or its own."""
        self._models.on_taken(lambda declaration: callback(declaration) if isinstance(declaration, ModelSnapshot) else None)

    def why(self, snapshot: ModelSnapshot) -> str:
        """Why it does not count; empty: it does."""
        taken = self._models.taken_by(snapshot)
        return f"it {taken.why}" if taken else ""

    async def run(self) -> None:
        """For ever."""
        told: set[tuple[str, str, str]] = set()
        self._news.set()
        while True:
            await self._news.wait()
            self._news.clear()
            taken = {(each.declaration.metadata.uid, each.model, each.owner): each for each in self._models.taken}
            told &= taken.keys()
            for key in taken.keys() - told:
                told.add(key)
                declaration = taken[key].declaration
                kind = MODEL_SNAPSHOTS if isinstance(declaration, ModelSnapshot) else SCALED_OBJECTS
                await self._events.event(kind, declaration.metadata, "Warning", REASON, f"it {taken[key].why}", "Declare")
