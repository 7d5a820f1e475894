"""Weights of snapshots in memory: they are filled, come back by themselves, and leave when they are told to.

A snapshot goes into memory with its weights, and these can leave without it: gpumem gives what nobody uses to whoever asks, to an engine
that wakes, say, and has nothing after it was started anew. The next request would wait for the disk then, though its image stands in memory
or its replica sleeps. So once they have been away for a while, and gpumem has room that nobody has, they are filled again, those of the
snapshot that is used most first. Nobody's weights leave for it. It is done for one snapshot at a time, and not while a replica is restored
or woken: what has begun is stopped then, and what has come stays for the next time. Weights that leave soon again stay away for longer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from restore_agent.drivers.weights import Weights, WeightsError
from restore_agent.drivers.weights_view import WeightsRung
from restore_agent.sequences.gpu_choice import staging_devices
from restore_agent.sequences.staging import Staging
from restore_agent.snapshots.catalog import Corrupt, NotFound, Snapshot
from zerowake_shared.background import ended, first_error
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_LOOK_SECONDS = 2.0
_FIRST_PAUSE, _LAST_PAUSE = 10.0, 600.0  # seconds for which they have been away; whoever took their room may be about to fill it
_NO_ROOM_SECONDS = 30.0  # from one try to the next where there is none

_LOG = logging.getLogger("zerowake.agent")


class ReturningWeights:
    """Of one node."""

    def __init__(
        self,
        staging: Staging,
        weights: Weights,
        asleep: Callable[[], Sequence[Snapshot]],
        gpus: Callable[[], Sequence[str]],
        look_again: Callable[[], Awaitable[object]],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`asleep`: of replicas that sleep in their pods. `gpus`: UUIDs of the node's, in the driver's order. `look_again`: has
        `weights.view` see where weights stand now."""
        self._staging, self._weights, self._asleep, self._gpus = staging, weights, asleep, gpus
        self._look_again, self._clock = look_again, clock
        self._pauses: dict[str, float] = {}  # by digest: seconds that they stayed away the last time
        self._due: dict[str, float] = {}  # digest → when its weights come back; of those that are away
        self._back: dict[str, float] = {}  # digest → when they came back last
        self._filling: tuple[str, asyncio.Task[bool]] | None = None  # whose weights come back now

    async def run(self, is_busy: Callable[[], bool]) -> None:
        """Until it is cancelled. `is_busy`: whether a replica is being restored or woken."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not is_busy():
                await self.look()

    async def look(self) -> None:
        """Brings back what is due and has room, of one snapshot."""
        is_known = self._weights.view.status is not None
        if not is_known or self._weights.on_their_way() or any(True for _ in self._staging.on_their_way()):
            return
        standing = self._standing()
        self._note(standing)
        for snapshot in standing:
            if snapshot.digest in self._due and self._due[snapshot.digest] <= self._clock.now() and await self._bring_back(snapshot):
                return

    async def fill(self, snapshot: Snapshot, *, urgent: bool = False, spare: bool = False) -> bool:
        """All of its weights, each where it may be. urgent, spare, and what is returned: as `Weights.stage` has them.

        Raises WeightsError, Corrupt, NotFound, OSError.
        """
        manifest = snapshot.manifest
        with first_error():
            async with asyncio.TaskGroup() as group:
                fills = []
                for region in await self._staging.regions(snapshot):
                    devices = staging_devices(manifest, region.record, self._gpus())
                    way = self._weights.stage(region, devices, manifest.tenant, snapshot, urgent=urgent, spare=spare)
                    fills.append(group.create_task(way))
        return all(fill.result() for fill in fills)

    async def let_go(self, snapshot: Snapshot) -> None:
        """Its weights leave, but for what another one that stands in memory, or sleeps, has, too. Raises WeightsError."""
        if self._filling and self._filling[0] == snapshot.digest:
            await ended([self._filling[1]])
        others = {record.region for each in self._standing() if each.digest != snapshot.digest for record in each.manifest.weights}
        if alone := [record for record in snapshot.manifest.weights if record.region not in others]:
            await self._weights.let_go(alone, snapshot.manifest.tenant)
            await self._look_again()

    def give_way(self, but: str = "") -> None:
        """A replica is made, of the snapshot of this digest: others' weights have time."""
        if self._filling and self._filling[0] != but:
            self._filling[1].cancel()

    def _standing(self) -> list[Snapshot]:
        """Each once, what is used most first."""
        return list({each.digest: each for each in (*self._staging.standing(), *self._asleep())}.values())

    def _note(self, standing: Sequence[Snapshot]) -> None:
        now = self._clock.now()
        away = {each.digest for each in standing if self._is_away(each)}
        kept = {each.digest for each in standing}
        kept -= {digest for digest, since in self._back.items() if digest not in away and now - since > self._pauses[digest]}
        self._pauses = {digest: seconds for digest, seconds in self._pauses.items() if digest in kept}
        self._back = {digest: since for digest, since in self._back.items() if digest in kept}
        self._due = {digest: due for digest, due in self._due.items() if digest in away}
        for digest in away - self._due.keys():
            self._pauses[digest] = min(2 * self._pauses.get(digest, _FIRST_PAUSE / 2), _LAST_PAUSE)
            self._due[digest] = now + self._pauses[digest]

    def _is_away(self, snapshot: Snapshot) -> bool:
        manifest = snapshot.manifest
        return self._weights.view.rung(manifest.weights, manifest.tenant) is WeightsRung.DISK

    async def _bring_back(self, snapshot: Snapshot) -> bool:
        """Whether anything was done."""
        task = asyncio.create_task(self._filled(snapshot), name=f"weights of {snapshot} come back")
        self._filling = snapshot.digest, task
        try:
            await asyncio.wait([task])
        finally:
            self._filling = None
            await ended([task])
        if task.cancelled():
            return True  # it is due still
        if not task.result():
            self._due[snapshot.digest] = self._clock.now() + _NO_ROOM_SECONDS
            return False
        self._due.pop(snapshot.digest, None)
        self._back[snapshot.digest] = self._clock.now()
        await self._look_again()
        return True

    async def _filled(self, snapshot: Snapshot) -> bool:
        """False: there is no room. What gpumem or the disk says else is told, as the next request will be told, too."""
        try:
            found_room = await self.fill(snapshot, spare=True)
        except (WeightsError, Corrupt, NotFound, OSError) as error:
            _LOG.warning("the weights of %s have left memory, and do not come back yet: %s", snapshot, error)
            return True
        if found_room:
            _LOG.info("the weights of %s had left memory, and are there again", snapshot)
        return found_room
