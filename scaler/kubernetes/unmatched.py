"""ScaledObjects of a model that no ModelSnapshot is of: a name that is spelt in two ways looks like two models, and each alone is in order.

Such a model is held for and scaled all the same, and its pods start cold: that may be meant, so it is told, once, and not refused.
"""

from __future__ import annotations

import asyncio
from difflib import get_close_matches

from scaler.kubernetes.declarations import Models
from scaler.kubernetes.events import Events
from scaler.kubernetes.resources import SCALED_OBJECTS

REASON = "NoModelSnapshot"
_LOOK_SECONDS = 10.0  # objects of one file are made one after the other: what is told was so at two looks


class Unmatched:
    """Tells while `run` runs: the leader's."""

    def __init__(self, events: Events, models: Models) -> None:
        self._events = events
        self._models = models

    async def run(self) -> None:
        """For ever."""
        before: set[tuple[str, str]] = set()
        told: set[tuple[str, str]] = set()
        while True:
            found = {(each.metadata.uid, model): each for each, model in self._models.without_snapshot()}
            told &= found.keys()
            for key in (found.keys() & before) - told:
                told.add(key)
                note = self._note(found[key].metadata.namespace, key[1])
                await self._events.event(SCALED_OBJECTS, found[key].metadata, "Warning", REASON, note, "Declare")
            before = set(found)
            await asyncio.sleep(_LOOK_SECONDS)

    def _note(self, namespace: str, model: str) -> str:
        there = sorted(self._models.snapshots_of(namespace))
        near = get_close_matches(model, there, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(there[:10])}" if there else ""
        return f"no ModelSnapshot of namespace {namespace} is of the model {model!r}: its pods start cold{hint}"
