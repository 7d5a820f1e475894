"""A snapshot that is on its way onto this node when an engine is wanted here: waited for, or not, by what is sooner.

An engine that starts cold takes so long as it took when the snapshot was made (`cold_seconds` of the manifest). The rest of a fetch takes
so long as its rate so far says, and a restore after it a moment more. The fetch is waited for as long as that is the sooner of the two, as
seen at each look; one that is left behind by its own estimate, since a source has gone, or another reader has the network, then costs no
more than has passed. And never for longer than a cold start takes: so whoever waits in vain has lost no more than that once. The fetch goes
on in any case, for the next one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from restore_agent.snapshots.manifest import Manifest
from restore_agent.transfer.progress import Progress
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_LOOK_SECONDS = 0.25
_FIRST_SECONDS = 2.0  # of a fetch, in which its sources are found and begin to send: nothing is known of its rate before


@dataclass(eq=False)
class Coming:
    """A snapshot whose fetch somebody has asked for. digest: empty: whichever the name stands for. askers: how many ask for it. ended: why
    it came to nothing, with the last of them; empty: the snapshot is here."""

    digest: str
    askers: int = 0
    since: float = math.inf  # when its fetch began
    manifest: Manifest | None = None
    progress: Progress = field(default_factory=lambda: Progress(0, 0, 0))
    ended: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def begun(
        self, now: float, progress: Callable[[Progress], None], fits: Callable[[Manifest], None]
    ) -> tuple[Callable[[Progress], None], Callable[[Manifest], None]]:
        """A fetch of it begins; what is to hear of its progress and of its manifest, beside these."""
        self.since, self.progress = now, Progress(0, 0, 0)

        def tell(now: Progress) -> None:
            self.progress = now
            progress(now)

        def look(manifest: Manifest) -> None:
            fits(manifest)
            self.manifest = manifest

        return tell, look

    def seconds_left(self, now: float) -> float:
        """At the rate so far; infinite where nothing has come."""
        left = self.progress.total - self.progress.done
        if self.progress.total and not left:
            return 0.0
        return left * (now - self.since) / self.progress.moved if self.progress.moved > 0 else math.inf


async def awaited(
    coming: Coming, seconds_to_restore: Callable[[Manifest], float], gone: asyncio.Future[None], clock: Clock = SYSTEM_CLOCK
) -> str:
    """Why it is not here, and is not waited for any longer; empty: it has come. `gone`: done when nobody wants it any more."""
    began = clock.now()
    either: tuple[asyncio.Future[Any], ...] = (coming.ended, gone)
    while not coming.ended.done():
        if gone.done():
            return "whoever it was for has gone"
        if why := _why_not(coming, seconds_to_restore, began, clock.now()):
            return why
        await asyncio.wait(either, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    return f"it was on its way to this node: {coming.ended.result()}" if coming.ended.result() else ""


def _why_not(coming: Coming, seconds_to_restore: Callable[[Manifest], float], began: float, now: float) -> str:
    """Why a cold start is the sooner one; empty: it is not, or nobody knows yet."""
    if coming.manifest is None:
        if now - min(coming.since, began) < _FIRST_SECONDS:
            return ""
        return "it is on its way to this node, and no source has said yet what it is"
    cold = coming.manifest.cold_seconds
    if not cold:
        return "it is on its way to this node, and nobody knows whether a cold start takes longer: take it again to have that measured"
    restore = seconds_to_restore(coming.manifest)
    seconds = coming.seconds_left(now) if now - coming.since >= _FIRST_SECONDS else 0.0
    if seconds + restore >= cold:
        when = f"in {seconds:.1f} s at its rate so far" if seconds < math.inf else "who knows when: nothing comes"
        return f"it is on its way to this node, and would be here {when}: a cold start takes {cold:.1f} s"
    if now - began >= cold:
        return f"it is on its way to this node, and has been waited for {now - began:.1f} s, which is what a cold start takes"
    return ""
