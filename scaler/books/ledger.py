"""Demand: how many requests every model has, held and in flight, and how many replicas there are to serve them.

The one source of truth for the gateway, KEDA's scaler, the autoscaler and the planner. One event loop, no threads, no awaits on the way
of a number: every question is answered from memory, because KEDA sets no deadline on its calls. Each model is an account; every change of
an account goes through one function, so an edge (no demand -> demand without a replica) cannot be missed by one of two ways of counting.

Watching follows the "version and one waiter" pattern: a change raises the account's version and wakes the waiters; `changed()` returns at
once when the version is newer than the one seen last. A burst wakes a watcher once, and the last change is never lost. Rejected: a queue
per watcher (grows with a burst, and 2,000 KEDA streams each replay stale edges) and asyncio.Condition (a lock on the way of every
request).

Where several gateways serve the same models, each has a ledger of its own, and the others' numbers in it as `remote`: KEDA is told the sum,
whichever ledger it asks, while whatever concerns one gateway's requests (its bounds, its activations) stays with its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

from scaler.books.limits import ModelLimits
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)


class UnknownModel(LookupError):
    """Nobody declared this model."""

    def __init__(self, model: str, known: Collection[str]) -> None:
        self.model = model
        self.known = tuple(known)
        listed = ", ".join(sorted(self.known)[:20]) or "none is declared"
        super().__init__(f"model {model!r} is not known; known models: {listed}")


class QueueFull(Exception):
    """A request cannot be held: the model's bound on requests or bytes is reached."""

    def __init__(self, model: str, bound: str, reason: str) -> None:
        self.bound = bound
        super().__init__(f"model {model!r} cannot hold another request: {reason}; try again later")


@dataclass(frozen=True, slots=True)
class Demand:
    """One model's numbers at one moment."""

    held: int  # requests waiting at the gateway
    in_flight: int  # requests a replica is working on
    replicas: int  # replicas that are ready, or draining

    @property
    def pending(self) -> int:
        return self.held + self.in_flight


class _Account:
    __slots__ = (
        "failure",
        "held",
        "held_bytes",
        "in_flight",
        "last_active",
        "limits",
        "name",
        "ready",
        "remote_held",
        "remote_in_flight",
        "replicas",
        "version",
        "waiters",
        "wanting",
        "wanting_anywhere",
        "watchers",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits: ModelLimits | None = None  # None: withdrawn, kept only until its last request and replica have gone
        self.held = self.held_bytes = self.in_flight = self.ready = self.replicas = self.version = self.watchers = 0
        self.last_active: float | None = None
        self.remote_held = self.remote_in_flight = 0
        self.wanting = False  # there is demand and no ready replica
        self.wanting_anywhere = False  # the same, with the demand of all gateways
        self.failure = ""
        self.waiters: set[asyncio.Future[None]] = set()


class Subscription:
    """Watches one model: `with ledger.subscribe(model) as sub: await sub.changed()`."""

    def __init__(self, account: _Account) -> None:
        self._account = account
        self._seen = account.version
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Subscription:
        self._account.watchers += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._account.watchers -= 1
        self._drop()

    def _drop(self) -> None:
        if self._waiter is not None:
            self._account.waiters.discard(self._waiter)
            self._waiter = None

    async def changed(self) -> None:
        """Returns when the demand (or the declaration) has changed since the last call, at once if it already has. Cancelling is safe."""
        if self._seen == self._account.version:
            self._waiter = asyncio.get_running_loop().create_future()
            self._account.waiters.add(self._waiter)
            try:
                await self._waiter
            finally:
                self._drop()
        self._seen = self._account.version


class Ledger:
    """Every model's demand. The methods below `failure` are for the gateway and its replicas: they say what happened to a request."""

    def __init__(self, models: Mapping[str, ModelLimits] | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self._now = clock.now
        self._accounts: dict[str, _Account] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._callbacks_anywhere: list[Callable[[str], None]] = []
        self._change_callbacks: list[Callable[[str], None]] = []
        self._declared_callbacks: list[Callable[[str], None]] = []
        for name, limits in (models or {}).items():
            self.declare(name, limits)

    def declare(self, model: str, limits: ModelLimits) -> None:
        """Makes the model known, or gives a known one new limits."""
        if not model:
            raise ValueError("a model's name must not be empty")
        account = self._accounts.setdefault(model, _Account(model))
        account.limits = limits
        self._changed(account)
        for callback in self._declared_callbacks:
            callback(model)

    def withdraw(self, model: str) -> None:
        """Makes the model unknown: its held requests are refused, those in flight finish. Raises: UnknownModel."""
        account = self._account(model)
        account.limits = None
        self._changed(account)
        for callback in self._declared_callbacks:
            callback(model)

    def models(self) -> Collection[str]:
        return [name for name, account in self._accounts.items() if account.limits is not None]

    def knows(self, model: str) -> bool:
        account = self._accounts.get(model)
        return account is not None and account.limits is not None

    def limits(self, model: str) -> ModelLimits:
        """Raises: UnknownModel."""
        limits = self._account(model).limits
        assert limits is not None
        return limits

    def demand(self, model: str) -> Demand:
        """Of this gateway. Raises: UnknownModel."""
        account = self._account(model)
        return Demand(account.held, account.in_flight, account.replicas)

    def demand_anywhere(self, model: str) -> Demand:
        """Of all gateways. Raises: UnknownModel."""
        account = self._account(model)
        return Demand(account.held + account.remote_held, account.in_flight + account.remote_in_flight, account.replicas)

    def own(self, model: str) -> Demand:
        """Of this gateway, whether the model is known or not."""
        account = self._accounts.get(model)
        return Demand(account.held, account.in_flight, account.replicas) if account is not None else Demand(0, 0, 0)

    def demands(self) -> Mapping[str, Demand]:
        """Of this gateway, for every model that has any."""
        return {name: self.own(name) for name, account in self._accounts.items() if account.held or account.in_flight}

    def held_bytes(self, model: str) -> int:
        """Bytes of the bodies of held requests. Raises: UnknownModel."""
        return self._account(model).held_bytes

    def last_active(self, model: str) -> float | None:
        """The last moment with a pending request; None: there was none yet. Raises: UnknownModel."""
        account = self._account(model)
        return self._now() if account.held or account.in_flight else account.last_active

    def subscribe(self, model: str) -> Subscription:
        """Watches the model's demand; withdrawing the model is a change too. Raises: UnknownModel."""
        return Subscription(self._account(model))

    def on_first_demand(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)`, in the same turn of the loop, whenever a model comes to have demand and no ready replica."""
        self._callbacks.append(callback)

    def on_first_demand_anywhere(self, callback: Callable[[str], None]) -> None:
        """The same for the demand of all gateways."""
        self._callbacks_anywhere.append(callback)

    def on_change(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)` at every change of this gateway's own demand. It is on the way of every request: keep it short."""
        self._change_callbacks.append(callback)

    def on_declaration(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)` after a model was declared, declared anew or withdrawn."""
        self._declared_callbacks.append(callback)

    def report_failure(self, model: str, reason: str) -> None:
        """Why the last try to make a replica failed: told to the clients that wait in vain. Forgotten when a replica is ready."""
        account = self._accounts.get(model)
        if account is not None:
            account.failure = reason

    def failure(self, model: str) -> str:
        """The last failure reported since a replica was ready; empty: none."""
        account = self._accounts.get(model)
        return account.failure if account is not None else ""

    def hold(self, model: str, size: int, *, bounded: bool = True) -> None:
        """A request with a body of `size` bytes begins to wait. Raises: UnknownModel, and QueueFull if the bounds apply to it."""
        account = self._account(model)
        limits = account.limits
        assert limits is not None
        if bounded and account.held >= limits.max_requests:
            raise QueueFull(model, "requests", f"{account.held} requests are held, the bound is {limits.max_requests}")
        if bounded and size and account.held_bytes + size > limits.max_bytes:
            raise QueueFull(model, "bytes", f"{account.held_bytes} bytes are held, {size} more would pass the bound of {limits.max_bytes}")
        self._move(account, held=1, size=size)

    def leave(self, model: str, size: int) -> None:
        """A held request has gone: its client left, or it was refused."""
        self._move(self._accounts[model], held=-1, size=-size)

    def start(self, model: str) -> None:
        """A request goes to a replica without having waited."""
        self._move(self._accounts[model], in_flight=1)

    def hand_over(self, model: str, size: int) -> None:
        """A held request goes to a replica."""
        self._move(self._accounts[model], held=-1, in_flight=1, size=-size)

    def end(self, model: str) -> None:
        """A replica has ended its work on a request."""
        self._move(self._accounts[model], in_flight=-1)

    def add_remote(self, model: str, held: int, in_flight: int) -> None:
        """Other gateways have so many requests more (less, where negative). The model need not be known here yet."""
        account = self._accounts.setdefault(model, _Account(model))
        account.remote_held += held
        account.remote_in_flight += in_flight
        self._changed(account)

    def set_replicas(self, model: str, ready: int, replicas: int) -> None:
        """The model's number of ready replicas, and of all that still work (ready or draining)."""
        account = self._accounts.setdefault(model, _Account(model))
        if ready > account.ready:
            account.failure = ""
        account.ready, account.replicas = ready, replicas
        self._changed(account)

    def _account(self, model: str) -> _Account:
        account = self._accounts.get(model)
        if account is None or account.limits is None:
            raise UnknownModel(model, self.models())
        return account

    def _move(self, account: _Account, held: int = 0, in_flight: int = 0, size: int = 0) -> None:
        account.held += held
        account.in_flight += in_flight
        account.held_bytes += size
        account.last_active = self._now()
        self._changed(account)
        self._call(self._change_callbacks, account.name)

    def _changed(self, account: _Account) -> None:
        pending = account.held + account.in_flight
        account.version += 1
        if account.waiters:
            for waiter in account.waiters:
                if not waiter.done():
                    waiter.set_result(None)
            account.waiters.clear()
        remote = account.remote_held + account.remote_in_flight
        unserved = account.ready == 0 and account.limits is not None
        wanting, wanting_anywhere = unserved and pending > 0, unserved and pending + remote > 0
        edge, edge_anywhere = wanting and not account.wanting, wanting_anywhere and not account.wanting_anywhere
        account.wanting, account.wanting_anywhere = wanting, wanting_anywhere
        if account.limits is None and not (pending or remote or account.replicas or account.watchers):
            self._accounts.pop(account.name, None)
        if edge:
            self._call(self._callbacks, account.name)
        if edge_anywhere:
            self._call(self._callbacks_anywhere, account.name)

    def _call(self, callbacks: Iterable[Callable[[str], None]], model: str) -> None:
        for callback in callbacks:
            try:
                callback(model)
            except Exception:  # a planner's fault must not cost the client its request
                log.exception("a callback of the ledger failed", extra={"fields": {"model": model}})
