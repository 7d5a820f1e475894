"""Requests that are idempotent by their request_id.

The work belongs to the id, not to the connection: a second call with it joins the work, or gets the same answer. When every caller of an
unfinished piece of work has gone, it is cancelled and undone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc

from restore_agent.errors import FAILURES, REASON, ErrorKind, kind_of, reason_of
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.lack import lack

_REMEMBERED = 4096  # finished requests whose answer is kept, each of some kilobytes
_REMEMBERED_SECONDS = 600.0  # after which nobody asks again
_Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")

_STATUS = {
    ErrorKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorKind.EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorKind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorKind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Requests:
    """All that were made lately."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._work: OrderedDict[tuple[str, str], _Work] = OrderedDict()

    async def once(self, kind: str, request_id: str, work: Callable[[], Awaitable[_T]], context: _Context) -> _T:
        """The answer of the request; what fails ends the call with its status, words and reason. `kind`: the method's name."""
        if not request_id:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "request_id is empty: give each request one of its own, and a retry the same"
            )
        key = (kind, request_id)
        entry = self._work.get(key)
        if entry is None:
            self._forget()
            entry = self._work[key] = _Work(work(), self._clock.now())
        try:
            result: _T = await entry.join()
            return result
        except asyncio.CancelledError:
            if entry.task.cancelled():
                self._work.pop(key, None)
            raise
        except Exception as error:
            # A failure is not remembered, whatever it is: the caller may have mended its cause.
            self._work.pop(key, None)
            why = lack(error, "the agent")
            if isinstance(error, FAILURES):
                context.set_trailing_metadata(((REASON, reason_of(error)),))
                await context.abort(_STATUS[kind_of(error)], why or str(error))
            if why:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
            raise

    def _forget(self) -> None:
        """The oldest, as far as nobody waits for them."""
        long_ago = self._clock.now() - _REMEMBERED_SECONDS
        while self._work:
            oldest = next(iter(self._work.values()))
            if not oldest.task.done() or (len(self._work) < _REMEMBERED and oldest.since > long_ago):
                return
            self._work.popitem(last=False)


@contextlib.asynccontextmanager
async def ended(work: Coroutine[Any, Any, _T]) -> AsyncIterator[asyncio.Task[_T]]:
    """Runs it beside the block, and ends it with that."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AbortError):
            await task


class _Work:
    """One piece of work and those who wait for it."""

    def __init__(self, work: Awaitable[Any], since: float) -> None:
        self.since = since
        self.task = asyncio.ensure_future(work)
        self._waiting = 0

    async def join(self) -> Any:
        self._waiting += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self._waiting -= 1
            if not self._waiting and not self.task.done():
                self.task.cancel()
                await asyncio.wait([self.task])
