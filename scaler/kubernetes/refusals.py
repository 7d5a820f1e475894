"""What agents refused to fetch or to stage, told at the ModelSnapshot: nobody trusts the snapshot, a store denies it, there is no room.

The planner asks again by itself, ever less often, and another node or a cold start serves meanwhile: without an event the snapshot's owner
would see slow starts and nothing else. So it is with a source that has other bytes, or is not to be trusted, while another has the right
ones: nobody would look before the good one is lost. What a node says is told once, until it says something else.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from scaler.kubernetes.events import Events
from scaler.kubernetes.resources import MODEL_SNAPSHOTS, ModelSnapshot
from scaler.plan.actions import Stage
from scaler.plan.rungs import Rung

FETCH, STAGE, SOURCE = "NotFetched", "NotStaged", "SourceLeft"


class Snapshots(Protocol):
    """An Informer of ModelSnapshots."""

    def get(self, namespace: str, name: str) -> ModelSnapshot | None: ...


class Refusals:
    """Tells while `run` runs: the leader's."""

    def __init__(self, events: Events, snapshots: Snapshots) -> None:
        self._events = events
        self._snapshots = snapshots
        self._news: asyncio.Queue[tuple[str, Stage, str, str]] | None = None  # None: another replica leads, and tells

    def refused(self, stage: Stage, node: str, why: str) -> None:
        """The node of that name did not do it."""
        self._note(FETCH if stage.rung is Rung.DISK else STAGE, stage, node, why)

    def complained(self, stage: Stage, node: str, why: str) -> None:
        """The node of that name did it, though one of the sources did wrong."""
        self._note(SOURCE, stage, node, why)

    async def run(self) -> None:
        """For ever."""
        told: dict[tuple[str, str, str, Rung], str] = {}  # (reason, digest, node, rung) → why
        self._news = asyncio.Queue()
        try:
            while True:
                reason, stage, node, why = await self._news.get()
                snapshot = self._snapshots.get(stage.snapshot.namespace, stage.snapshot.name)
                key = reason, stage.digest, node, stage.rung
                if snapshot is None or told.get(key) == why:
                    continue
                told[key] = why
                await self._events.event(MODEL_SNAPSHOTS, snapshot.metadata, "Warning", reason, f"node {node}: {why}", "Stage")
        finally:
            self._news = None

    def _note(self, reason: str, stage: Stage, node: str, why: str) -> None:
        if self._news is not None:
            self._news.put_nowait((reason, stage, node, why))
