"""What is said of a model's sources of demand in its ModelSnapshot: the condition `Sources`.

It is said by the replica that leads, of what it hears itself; each replica asks all sources.
"""

from __future__ import annotations

from collections.abc import Callable

from scaler.kubernetes.declarations import Models
from scaler.kubernetes.resources import CONDITION_SOURCES, Condition, ModelSnapshot
from scaler.sources.watch import Sources, SourceState

HEARD, REFUSED, SILENT, ASKED = "Heard", "Refused", "Silent", "Asked"


class SourceConditions:
    """models: whose sources they are; sources: what they say."""

    def __init__(self, models: Models, sources: Sources) -> None:
        self._models = models
        self._sources = sources

    def on_change(self, callback: Callable[[ModelSnapshot], None]) -> None:
        """Calls `callback(snapshot)` when what is to be said of its model's sources may have changed."""

        def told(model: str) -> None:
            if snapshot := self._models.with_sources(model):
                callback(snapshot)

        self._sources.on_speech(told)

    def of(self, snapshot: ModelSnapshot) -> Condition | None:
        """None: it has no sources that count."""
        counting = self._models.with_sources(snapshot.model)
        states = self._sources.states_of(snapshot.model)
        if not states or counting is None or counting.key != snapshot.key:
            return None
        generation = snapshot.metadata.generation
        unknown = [each for each in states if each.reading is None]
        message = "; ".join(f"{each.name}: {_why(each)}" for each in unknown)
        if refused := [each for each in unknown if each.refused]:
            message = "; ".join(each.fault for each in refused)
            return Condition(CONDITION_SOURCES, "False", REFUSED, message, observed_generation=generation)
        if any(each.fault or each.age_seconds is not None for each in unknown):
            message += "; replicas stay as they are, and KEDA's calls fail meanwhile, so that a ScaledObject's fallback counts"
            return Condition(CONDITION_SOURCES, "False", SILENT, message, observed_generation=generation)
        if unknown:
            before = snapshot.status.condition(CONDITION_SOURCES)
            if before is not None and before.observed_generation == generation:
                return before  # whoever leads newly asks them for the first time
            return Condition(CONDITION_SOURCES, "Unknown", ASKED, message, observed_generation=generation)
        return Condition(CONDITION_SOURCES, "True", HEARD, "", observed_generation=generation)


def worth_telling(before: Condition | None, now: Condition) -> bool:
    """Whether an event is. What is refused for another reason is news; how a silent source fails may change at each try."""
    if before is None or (before.status, before.reason) != (now.status, now.reason):
        return True
    return now.reason == REFUSED and before.message != now.message


def _why(state: SourceState) -> str:
    return f"{state.says} was not heard of{f': {state.fault}' if state.fault else ''}"
