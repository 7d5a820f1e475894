"""Demand as it is read: what KEDA's scaler, the autoscaler, the planner and the metrics ask, without a say in it.

The ledger is what they ask (ledger.py). Who only reads is given it as a `DemandReader`, so that its signature says so.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from scaler.books.limits import ModelLimits


class UnknownModel(LookupError):
    """Nobody declared this model. The others are not named: on a cluster they are other people's, and anybody hears this."""

    def __init__(self, model: str, known: Collection[str]) -> None:
        self.model = model
        elsewhere = "the gateway's /v1/models lists those that are" if known else "none is declared"
        super().__init__(f"model {model!r} is not known; {elsewhere}")


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What is asked of a model past all gateways, as its sources say (scaler/sources).

    pending: requests; replicas: so many are to be there whatever is pending; unknown: which of the sources are silent, and why, so that
    there may be more; empty: all of them speak.
    """

    pending: int = 0
    replicas: int = 0
    unknown: str = ""


NOTHING = Elsewhere()


@dataclass(frozen=True, slots=True)
class Demand:
    """One model's numbers at one moment."""

    held: int  # requests waiting at the gateway
    in_flight: int  # requests a replica is working on
    replicas: int  # replicas that are ready, or draining
    unreachable: int = 0  # those of them at which nothing answers: their node may be cut off
    elsewhere: Elsewhere = NOTHING

    @property
    def pending(self) -> int:
        """All requests; at least one a replica that is to be there anyway."""
        return max(self.held + self.in_flight + self.elsewhere.pending, self.elsewhere.replicas)

    @property
    def idle(self) -> bool:
        """Nobody asks, as far as can be known: where a source is silent, it cannot."""
        return not (self.pending or self.elsewhere.unknown)

    def load(self, target: float) -> float:
        """What an autoscaler is told that gives each replica `target`: one that nobody reaches has that much to itself, or it would be
        counted on for what is pending."""
        asked = max(self.held + self.in_flight + self.elsewhere.pending, self.elsewhere.replicas * target)
        if not (asked and self.unreachable):
            return asked
        return (math.ceil(asked / target) + self.unreachable) * target

    def unsure(self, target: float) -> str:
        """Why `load` is not to be acted upon: what a silent source would say may be what the replicas are there for. Empty: it is, as all
        sources speak, or what is known is more than the replicas are meant for."""
        return "" if self.load(target) > self.replicas * target else self.elsewhere.unknown


class Watched:
    """What a subscription looks at: a version that every change raises, and whoever waits for the next one."""

    __slots__ = ("version", "waiters", "watchers")

    def __init__(self) -> None:
        self.version = self.watchers = 0
        self.waiters: set[asyncio.Future[None]] = set()

    def changed(self) -> None:
        self.version += 1
        if self.waiters:
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self.waiters.clear()


class Subscription:
    """Watches one model: `with ledger.subscribe(model) as sub: await sub.changed()`."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._seen = watched.version
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Subscription:
        self._watched.watchers += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watched.watchers -= 1
        self._drop()

    def _drop(self) -> None:
        if self._waiter is not None:
            self._watched.waiters.discard(self._waiter)
            self._waiter = None

    async def changed(self) -> None:
        """Returns when the demand (or the declaration) has changed since the last call, at once if it already has. Cancelling is safe."""
        if self._seen == self._watched.version:
            self._waiter = asyncio.get_running_loop().create_future()
            self._watched.waiters.add(self._waiter)
            try:
                await self._waiter
            finally:
                self._drop()
        self._seen = self._watched.version


class DemandReader(Protocol):
    """Every model's demand, read only."""

    def models(self) -> Collection[str]:
        """Those that are declared."""

    def knows(self, model: str) -> bool: ...

    def named(self, name: str) -> str:
        """The model that is called so, or whose server answers to that name too; empty: none."""

    def names(self, model: str) -> Collection[str]:
        """What else the model is called."""

    def limits(self, model: str) -> ModelLimits:
        """Raises: UnknownModel."""

    def demand(self, model: str) -> Demand:
        """Of this gateway. Raises: UnknownModel."""

    def demand_anywhere(self, model: str) -> Demand:
        """Of all gateways, and elsewhere. Raises: UnknownModel."""

    def turns(self, model: str) -> int:
        """How often demand, of all gateways and elsewhere, has begun or ended so far: who looks now and then sees that there was some in
        between. While a source is silent there may be some."""

    def held_bytes(self, model: str) -> int:
        """Bytes of the bodies of held requests. Raises: UnknownModel."""

    def failure(self, model: str) -> str:
        """Why the last try to make a replica failed, unless one is ready since; empty: none has failed."""

    def subscribe(self, model: str) -> Subscription:
        """Watches the model's demand; withdrawing the model is a change too. Raises: UnknownModel."""

    def on_first_demand(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)`, in the same turn of the loop, whenever a model comes to have demand, here or elsewhere, and no ready
        replica."""

    def on_first_demand_anywhere(self, callback: Callable[[str], None]) -> None:
        """The same for the demand of all gateways, and elsewhere."""

    def on_declaration(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)` after a model was declared, declared anew or withdrawn."""
