"""One attempt at a restore, a wake or another move of an engine: whatever it fails by, its end is one error that has a reason.

Restoring is an optimisation, never a new way to fail: who asked for it reads the reason, and starts the engine cold where it can.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from restore_agent.errors import FAILURES, AgentError, reason_of
from restore_agent.snapshots.catalog import Snapshot


class RestoreFailed(AgentError):
    """A replica could not be restored; `reason` is one of a few keys, the text says what happened. `unfit`: what is here of the snapshot
    for a cold start, where it is not here itself."""

    def __init__(self, reason: str, detail: str, unfit: Snapshot | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.unfit = unfit


@contextlib.asynccontextmanager
async def attempt(snapshot: Snapshot, seconds: float | None = None) -> AsyncIterator[None]:
    """The block is given up after so many seconds; without `seconds`, after as many as a restore of this snapshot may take at the most.

    Raises RestoreFailed for whatever named failure ends the block.
    """
    try:
        async with asyncio.timeout(_deadline(snapshot) if seconds is None else seconds):
            yield
    except RestoreFailed:
        raise
    except FAILURES as error:
        raise RestoreFailed(reason_of(error), f"snapshot {snapshot}: {str(error) or 'it took too long and was given up'}") from error


def _deadline(snapshot: Snapshot) -> float:
    """A minute, and for huge images a second for each 100 MiB: CRIU has been seen to spin for ever on a torn image."""
    return 60.0 + snapshot.manifest.image_bytes / (100 << 20)
