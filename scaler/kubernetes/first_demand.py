"""What is done about a model from its first request on: a task of its own for each model, owned and ended by one object.

A model comes to have requests and no replica again and again, also while the task of the time before is at work. Whoever begins says which
of the two counts: the work anew, with its whole time, or the work that is under way, whose patience began with the earlier request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from scaler.books.demand import DemandReader
from zerowake_shared.background import ended, told

log = logging.getLogger(__name__)


class FirstDemand:
    """Runs `work(model)` when a model comes to have demand and no ready replica; `close` ends what is under way.

    what: of the tasks' names. anew: the work of the time before is ended, instead of going on in the place of this one.
    """

    def __init__(self, ledger: DemandReader, work: Callable[[str], Coroutine[Any, Any, None]], what: str, *, anew: bool) -> None:
        self._work = work
        self._what = what
        self._anew = anew
        self._tasks: dict[str, asyncio.Task[None]] = {}
        ledger.on_first_demand(self._begin)

    async def close(self) -> None:
        await ended(self._tasks.values())

    def _begin(self, model: str) -> None:
        if before := self._tasks.get(model):
            if not self._anew:
                return
            before.cancel()
        task = self._tasks[model] = asyncio.create_task(self._work(model), name=f"{self._what} of {model}")
        told(task, log)
        task.add_done_callback(lambda done: self._tasks.pop(model) if self._tasks.get(model) is done else None)
