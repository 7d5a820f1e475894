"""Weights that come back by themselves, and those that are told to leave.

A snapshot goes into memory with its weights, and these can leave without it: gpumem gives what nobody uses to whoever asks, to an engine
that wakes, say, and has nothing after it was started anew. The next request would wait for the disk then, though its image stands in memory
or its replica waits parked. So once they have been away for a while, and gpumem has room that nobody has, they are filled again, those of
the snapshot that is used most first. Nobody's weights leave for it. It is done for one snapshot at a time, and not while a replica is
made: what has begun is stopped then, and what has come stays for the next time. Weights that leave again stay away for longer each time.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence

from restore_agent.drivers.weights import Weights, WeightsError
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.sequences.gpu_choice import staging_devices
from restore_agent.sequences.staging import Staging
from restore_agent.snapshots.catalog import Corrupt, NotFound, Snapshot
from zerowake_shared.background import ended, first_error
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_LOOK_SECONDS = 2.0
_FIRST_PAUSE, _LAST_PAUSE = 10.0, 600.0  # seconds for which they have been away; whoever took their room may be about to fill it

_LOG = logging.getLogger("zerowake.agent")


class ReturningWeights:
    """Of one node."""

    def __init__(
        self,
        staging: Staging,
        weights: Weights,
        gpus: Callable[[], Sequence[str]],
        look_again: Callable[[], Awaitable[object]],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`gpus`: UUIDs of the node's, in the driver's order. `look_again`: has `weights.view` see where weights stand now."""
        self._staging, self._weights, self._gpus, self._look_again, self._clock = staging, weights, gpus, look_again, clock
        self._pauses: dict[str, Backoff] = {}  # by digest, of what stands in memory
        self._due: dict[str, float] = {}  # digest → when its weights come back; of those that are away
        self._filling: tuple[str, asyncio.Task[None]] | None = None  # whose weights come back now

    async def run(self, is_busy: Callable[[], bool]) -> None:
        """Until it is cancelled. `is_busy`: whether a replica is being made."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not is_busy():
                await self.look()

    async def look(self) -> None:
        """Brings back what is due and has room, of one snapshot."""
        standing = self._staging.standing()
        self._note(standing)
        if self._weights.on_their_way() or any(True for _ in self._staging.on_their_way()):
            return
        for snapshot in standing:
            due = self._due.get(snapshot.digest, math.inf)
            if due <= self._clock.now() and (places := self._places(snapshot)) is not None:
                await self._bring_back(snapshot, places)
                return

    async def let_go(self, snapshot: Snapshot) -> None:
        """Its weights leave, but for what something else in memory has, too. Raises WeightsError."""
        others = {record.region for each in self._staging.standing() if each.digest != snapshot.digest for record in each.manifest.weights}
        if alone := [record for record in snapshot.manifest.weights if record.region not in others]:
            await self._weights.let_go(alone, snapshot.manifest.tenant)
            await self._look_again()

    def give_way(self, but: str = "") -> None:
        """A replica is made, of the snapshot of this digest: others' weights have time."""
        if self._filling and self._filling[0] != but:
            self._filling[1].cancel()

    def _note(self, standing: Sequence[Snapshot]) -> None:
        digests = {snapshot.digest for snapshot in standing}
        self._pauses = {digest: pause for digest, pause in self._pauses.items() if digest in digests}
        away = {each.digest for each in standing if self._is_away(each)}
        self._due = {digest: due for digest, due in self._due.items() if digest in away}
        for digest in away - self._due.keys():
            pause = self._pauses.setdefault(digest, Backoff(_FIRST_PAUSE, _LAST_PAUSE))
            self._due[digest] = self._clock.now() + pause.next()

    def _is_away(self, snapshot: Snapshot) -> bool:
        manifest = snapshot.manifest
        return self._weights.view.rung(manifest.weights, manifest.tenant) is WeightsRung.DISK

    def _places(self, snapshot: Snapshot) -> dict[str, str] | None:
        """Region → where it comes to (a device; empty: the arena), of those that are away; None: there is no room for all of them."""
        manifest, view = snapshot.manifest, self._weights.view
        away = [record for record in manifest.weights if view.rung([record], manifest.tenant) is WeightsRung.DISK]
        return view.places({record.region: (record.size, staging_devices(manifest, record, self._gpus())) for record in away})

    async def _bring_back(self, snapshot: Snapshot, places: Mapping[str, str]) -> None:
        task = asyncio.create_task(self._filled(snapshot, places), name=f"weights of {snapshot} come back")
        self._filling = snapshot.digest, task
        try:
            await asyncio.wait([task])
        finally:
            self._filling = None
            await ended([task])
        if not task.cancelled():  # else it is due still
            task.result()
            self._due.pop(snapshot.digest, None)
            await self._look_again()

    async def _filled(self, snapshot: Snapshot, places: Mapping[str, str]) -> None:
        """Whatever gpumem or the disk says to it: the next request is told so, too."""
        try:
            with first_error():
                async with asyncio.TaskGroup() as group:
                    for region in await self._staging.regions(snapshot):
                        if (place := places.get(region.record.region)) is not None:
                            group.create_task(self._weights.fill_into(region, place, snapshot.manifest.tenant, of=snapshot))
        except (WeightsError, Corrupt, NotFound, OSError) as error:
            _LOG.warning("the weights of %s have left memory, and do not come back yet: %s", snapshot, error)
        else:
            _LOG.info("the weights of %s had left memory, and are there again", snapshot)
