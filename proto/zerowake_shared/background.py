"""Work that runs for ever beside a block: when it ends, somebody notices.

A task that nobody awaits takes its error with it, and the program goes on without what the task did. `beside` ties the two together: an
error of the work ends the block and is raised from it, as if it had happened there. For work on one thing of many, whose failure must not
end the others, `told` says what ended instead; and what must go on in spite of a bug is `kept`.
Beside those: how the errors of several tasks become one, and work that is waited for also by whoever was cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from zerowake_shared.backoff import Backoff

_FIRST_PAUSE, _LAST_PAUSE = 0.5, 30.0
_T = TypeVar("_T")


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Around a group of tasks: raises what the first of them failed by, in the place of a group of errors."""
    try:
        yield
    except BaseExceptionGroup as failed:
        # One of them failed, and took the others along: what matters is the first.
        raise failed.exceptions[0] from failed.exceptions[0].__cause__


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Runs `work` until the block ends, which cancels it. Raises what `work` raises, after it has cancelled the block."""
    with first_error():
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work, name=name)
            try:
                yield task
            finally:
                task.cancel()


def is_cancelled() -> bool:
    """Whether somebody has cancelled the task that runs. Where nobody has, a CancelledError is the end of what it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def kept(work: Callable[[], Coroutine[Any, Any, None]], name: str, log: logging.Logger) -> None:
    """Does the work until it returns; where it ends by an error, that is logged, and it is begun again after a pause."""
    backoff = Backoff(_FIRST_PAUSE, _LAST_PAUSE)
    while True:
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:  # whatever it is: without the work the program would go on and be wrong
            if is_cancelled():
                if isinstance(error, asyncio.CancelledError):
                    raise
                # It failed as it cleaned up: to begin again would be to lose the cancellation for ever.
                log.exception("%s: ended by a bug as it was cancelled", name)
                raise asyncio.CancelledError from error
            pause = backoff.next()
            log.exception("%s: ended by a bug, and is begun again in %.1f s", name, pause)
            await asyncio.sleep(pause)
        else:
            return


def kept_beside(work: Callable[[], Coroutine[Any, Any, None]], name: str, log: logging.Logger) -> AbstractAsyncContextManager[object]:
    """`kept`, until the block ends."""
    return beside(kept(work, name, log), name)


async def to_its_end(work: Awaitable[_T]) -> _T:
    """Its result. Its end is awaited also where the caller is cancelled meanwhile: a thread of it uses what the caller would take away."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels them and returns once they have ended. What any of them ended by is not raised: that is `told`'s."""
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


def told(task: asyncio.Task[Any], log: logging.Logger) -> None:
    """Logs an error that `task` ends by, under the task's name."""

    def tell(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("%s: ended by a bug: %s", task.get_name(), error, exc_info=error)

    task.add_done_callback(tell)
