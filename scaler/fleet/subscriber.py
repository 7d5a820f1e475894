"""One replica of the scaler that listens to this one's numbers: what it has not been told yet, and when it is told.

What is urgent is told at once: that a model has come to have requests, that KEDA was told of it, and what was posted of its demand. All
else is gathered for 20 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable

from zerowake_proto import peers_pb2 as pb

from scaler.fleet.post import Post

GATHER_SECONDS = 0.02


class Subscriber:
    """`now`: the clock, in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._changed: dict[str, None] = {}
        self._pushed: list[str] = []
        self._posts: list[Post] = []
        self._wanting: set[str] = set()  # models of which it was told that they have requests
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()
        self._sent = -math.inf

    def note(self, model: str, pending: bool) -> None:
        """The model's numbers have changed. pending: it has requests."""
        self._changed[model] = None
        self._news.set()
        if pending and model not in self._wanting:
            self._urgent.set()

    def pushed(self, model: str) -> None:
        """KEDA was told that the model is in use."""
        self._pushed.append(model)
        self._news.set()
        self._urgent.set()  # an activation may be over in less than the time that news are gathered

    def posted(self, post: Post) -> None:
        """Somebody has posted demand."""
        self._posts.append(post)
        self._news.set()
        self._urgent.set()

    def end(self) -> None:
        """Whoever waits for news looks again."""
        self._news.set()
        self._urgent.set()

    async def due(self) -> tuple[Iterable[str], Iterable[str], Iterable[Post]]:
        """The models that changed, those pushed, and what was posted, when it is time to tell."""
        await self._news.wait()
        if not self._urgent.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._sent + GATHER_SECONDS - self._now()):
                    await self._urgent.wait()
        self._news.clear()
        self._urgent.clear()
        self._sent = self._now()
        changed, self._changed = self._changed, {}
        pushed, self._pushed = self._pushed, []
        posts, self._posts = self._posts, []
        return changed, pushed, posts

    def told(self, demands: Iterable[pb.Demand]) -> None:
        """These numbers are on their way."""
        for demand in demands:
            if demand.held or demand.in_flight:
                self._wanting.add(demand.model)
            else:
                self._wanting.discard(demand.model)
