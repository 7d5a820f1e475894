"""Work that runs for ever beside a block: when it ends, somebody notices.

A task that nobody awaits takes its error with it, and the program goes on without what the task did. `beside` ties the two together: an
error of the work ends the block and is raised from it, as if it had happened there. For work on one thing of many, whose failure must not
end the others, `told` says what ended instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Runs `work` until the block ends, which cancels it. Raises what `work` raises, after it has cancelled the block."""
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work, name=name)
            try:
                yield task
            finally:
                task.cancel()
    except BaseExceptionGroup as failed:
        # One of them failed, and took the other along: what matters is the first.
        raise failed.exceptions[0] from failed.exceptions[0].__cause__


def told(task: asyncio.Task[Any], log: logging.Logger) -> None:
    """Logs an error that `task` ends by, under the task's name."""

    def ended(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("%s: ended by a bug: %s", task.get_name(), error, exc_info=error)

    task.add_done_callback(ended)
