"""The ledger: how many requests every model has, held and in flight, and how many replicas there are to serve them.

The one source of truth for the gateway, KEDA's scaler, the autoscaler and the planner. One event loop, no threads, no awaits on the way
of a number: every question is answered from memory, because KEDA sets no deadline on its calls. Each model is an account; every change of
an account goes through one function, so an edge (no demand -> demand without a replica) cannot be missed by one of two ways of counting.
The edge also opens the model's activation, before anybody is told of it: whoever listens finds it open, in whatever order they came.

Watching follows the "version and one waiter" pattern: a change raises the account's version and wakes the waiters; `changed()` returns at
once when the version is newer than the one seen last. A burst wakes a watcher once, and the last change is never lost. Rejected: a queue
per watcher (grows with a burst, and 2,000 KEDA streams each replay stale edges) and asyncio.Condition (a lock on the way of every
request).

What all models together hold is bounded, too, since memory is one. Of that bound a model may hold as much as is left free for all (dynamic
thresholds, as switches share their buffers): a flood of one model takes half of it at most, two take two thirds, and a model that holds
little is let in. Rejected: a fixed share for each (of a thousand models it would be none), first come (one model's flood refuses others).

Where several gateways serve the same models, each has a ledger of its own, and the others' numbers in it as `remote`: KEDA is told the sum,
whichever ledger it asks, while whatever concerns one gateway's requests (its bounds, its activations) stays with its own.
What is asked of a model past all gateways is in each ledger as `elsewhere`: every scaler asks the sources for itself, and plans for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from scaler.books.activation import Activations
from scaler.books.demand import NOTHING, Demand, Elsewhere, Subscription, UnknownModel, Watched
from scaler.books.limits import TOTAL_BYTES, TOTAL_REQUESTS, ModelLimits
from scaler.books.model_name import check_model_name
from scaler.books.signal import Signal
from zerowake_shared.phases import Phase

_NONE = Demand(0, 0, 0)


class QueueFull(Exception):
    """A request cannot be held: a bound on requests or bytes is reached, the model's or its part of all models'."""

    def __init__(self, model: str, bound: str, reason: str) -> None:
        self.bound = bound
        super().__init__(f"model {model!r} cannot hold another request: {reason}; try again later")


class _Account(Watched):
    """One model's numbers."""

    __slots__ = (
        "asked",
        "begun",
        "elsewhere",
        "failure",
        "held",
        "held_bytes",
        "in_flight",
        "limits",
        "name",
        "names",
        "quiet_since",
        "ready",
        "remote_held",
        "remote_in_flight",
        "replicas",
        "turns",
        "unreachable",
        "wanting",
        "wanting_anywhere",
        "wanting_here",
    )

    def __init__(self, name: str, now: float) -> None:
        super().__init__()
        self.name = name
        self.names: tuple[str, ...] = ()
        self.limits: ModelLimits | None = None  # None: withdrawn, kept only until its last request and replica have gone
        self.held = self.held_bytes = self.in_flight = self.ready = self.replicas = self.unreachable = 0
        self.begun = 0  # how often a request came to be in flight
        self.remote_held = self.remote_in_flight = 0
        self.elsewhere = NOTHING
        self.asked = False  # there is demand at some gateway or elsewhere
        self.wanting = False  # requests are here and no ready replica
        self.wanting_here = False  # the same, with what is asked elsewhere
        self.wanting_anywhere = False  # the same, with the demand of all gateways, too
        self.turns = 0  # odd: there is demand at some gateway or elsewhere, or there may be
        self.quiet_since = now  # there has been no demand since then, if there is none
        self.failure = ""


class Ledger:
    """Every model's demand: read as a DemandReader, and written by whoever declares models, serves requests and hears other gateways.

    activations: where the edge of a model's demand opens its activation.
    """

    def __init__(self, models: Mapping[str, ModelLimits] | None = None, activations: Activations | None = None) -> None:
        self.activations = activations or Activations()
        self.on_first_demand = Signal()  # a model comes to have demand, here or elsewhere, and no ready replica
        self.on_first_demand_anywhere = Signal()  # the same with the demand of all gateways
        self.on_asked = Signal()  # the demand of all gateways and elsewhere begins, whether or not there is a replica
        self.on_quiet = Signal()  # that demand has ended; both are on the way of requests: keep them short
        self.on_declaration = Signal()  # a model was declared, declared anew or withdrawn
        self.on_change = Signal()  # this gateway's own demand changed; it is on the way of every request: keep it short
        self._held = self._held_bytes = 0  # of all models
        self._accounts: dict[str, _Account] = {}
        self._names: dict[str, str] = {}  # what else models are called, and which; the first that is declared keeps a name
        for name, limits in (models or {}).items():
            self.declare(name, limits)

    # --- read by all: DemandReader

    def models(self) -> Collection[str]:
        return [name for name, account in self._accounts.items() if account.limits is not None]

    def knows(self, model: str) -> bool:
        account = self._accounts.get(model)
        return account is not None and account.limits is not None

    def named(self, name: str) -> str:
        return name if self.knows(name) else self._names.get(name, "")

    def names(self, model: str) -> Collection[str]:
        return [name for name, meant in self._names.items() if meant == model and not self.knows(name)]

    def limits(self, model: str) -> ModelLimits:
        limits = self._account(model).limits
        assert limits is not None
        return limits

    def demand(self, model: str) -> Demand:
        account = self._account(model)
        return Demand(account.held, account.in_flight, account.replicas, account.unreachable)

    def demand_anywhere(self, model: str) -> Demand:
        account = self._account(model)
        held, in_flight = account.held + account.remote_held, account.in_flight + account.remote_in_flight
        return Demand(held, in_flight, account.replicas, account.unreachable, account.elsewhere)

    def turns(self, model: str) -> int:
        account = self._accounts.get(model)
        return account.turns if account is not None else 0

    def quiet_since(self, model: str) -> float:
        """The moment, by the activations' clock, since which nobody asks for it; before the first one, when the model came up."""
        account = self._accounts.get(model)
        return account.quiet_since if account is not None else self.activations.clock.now()

    def held_bytes(self, model: str) -> int:
        return self._account(model).held_bytes

    def failure(self, model: str) -> str:
        account = self._accounts.get(model)
        return account.failure if account is not None else ""

    def subscribe(self, model: str) -> Subscription:
        return Subscription(self._account(model))

    # --- written by whoever declares models, and by whoever makes replicas

    def declare(self, model: str, limits: ModelLimits, names: Collection[str] = ()) -> None:
        """Makes the model known, or gives a known one new limits. names: what else its server answers to. Raises: BadModelName."""
        for name in (model, *names):
            check_model_name(name)
        account = self._accounts.setdefault(model, _Account(model, self.activations.clock.now()))
        account.limits = limits
        self._rename(account, tuple(names))
        self._changed(account)
        self.on_declaration.tell(model)

    def withdraw(self, model: str) -> None:
        """Makes the model unknown: its held requests are refused, those in flight finish. Raises: UnknownModel."""
        account = self._account(model)
        account.limits = None
        self._rename(account, ())
        self._changed(account)
        self.on_declaration.tell(model)

    def report_failure(self, model: str, reason: str) -> None:
        """Why the last try to make a replica failed: told to the clients that wait in vain. Forgotten when a replica is ready."""
        account = self._accounts.get(model)
        if account is not None:
            account.failure = reason

    # --- written by the gateway's dispatcher: what happens to requests and replicas

    def hold(self, model: str, size: int, *, bounded: bool = True, arrived: float | None = None) -> None:
        """A request with a body of `size` bytes begins to wait. arrived: when it came, by the activations' clock; None: now.

        Raises: UnknownModel, and QueueFull if the bounds apply to it.
        """
        account = self._account(model)
        limits = account.limits
        assert limits is not None
        if bounded and account.held >= limits.max_requests:
            raise QueueFull(model, "requests", f"{account.held} requests are held, the bound is {limits.max_requests}")
        if bounded and size and account.held_bytes + size > limits.max_bytes:
            raise QueueFull(model, "bytes", f"{account.held_bytes} bytes are held, {size} more would pass the bound of {limits.max_bytes}")
        if bounded:
            self._check_total(account, size, limits)
        self._move(account, held=1, size=size, arrived=arrived)

    def _check_total(self, account: _Account, size: int, limits: ModelLimits) -> None:
        """Raises: QueueFull if the model holds more than is left for all. A model that is alone reaches its own bound."""
        requests, bytes_ = max(TOTAL_REQUESTS, 2 * limits.max_requests), max(TOTAL_BYTES, 2 * limits.max_bytes)
        if account.held >= requests - self._held:
            reason = f"{account.held} requests of it are held and {self._held} of all models, of {requests} at most"
            raise QueueFull(account.name, "requests", reason)
        if size and account.held_bytes + size > bytes_ - self._held_bytes:
            reason = f"{account.held_bytes} bytes of it are held and {self._held_bytes} of all models, of {bytes_} at most; this has {size}"
            raise QueueFull(account.name, "bytes", reason)

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

    def gave_up(self, model: str, reason: str) -> None:
        """A request of the model has ended without an answer: if it was the last one, so does the activation."""
        if self.activations.current(model) is not None and (not self.knows(model) or self.demand(model).pending == 0):
            self.activations.abandoned(model, reason)

    def set_replicas(self, model: str, ready: int, replicas: int, unreachable: int = 0) -> None:
        """The model's number of ready replicas, of all that still work (ready or draining), and of those at which nothing answers."""
        account = self._accounts.setdefault(model, _Account(model, self.activations.clock.now()))
        if ready > account.ready:
            account.failure = ""
        account.ready, account.replicas, account.unreachable = ready, replicas, unreachable
        self._changed(account)

    # --- between gateways

    def own(self, model: str) -> Demand:
        """Of this gateway, whether the model is known or not."""
        account = self._accounts.get(model)
        return Demand(account.held, account.in_flight, account.replicas, account.unreachable) if account is not None else _NONE

    def demands(self) -> Mapping[str, Demand]:
        """Of this gateway, for every model that has any, or had."""
        return {name: self.own(name) for name, account in self._accounts.items() if account.held or account.in_flight or account.begun}

    def begun(self, model: str) -> int:
        """How often a request of this gateway came to be in flight, since the model came up."""
        account = self._accounts.get(model)
        return account.begun if account is not None else 0

    def add_remote(self, model: str, held: int, in_flight: int) -> None:
        """Other gateways have so many requests more (less, where negative). The model need not be known here yet."""
        account = self._accounts.setdefault(model, _Account(model, self.activations.clock.now()))
        account.remote_held += held
        account.remote_in_flight += in_flight
        self._changed(account)

    # --- elsewhere

    def set_elsewhere(self, model: str, elsewhere: Elsewhere) -> None:
        """What its sources say now. The model need not be known here yet."""
        account = self._accounts.setdefault(model, _Account(model, self.activations.clock.now()))
        if account.elsewhere != elsewhere:
            account.elsewhere = elsewhere
            self._changed(account)

    def _rename(self, account: _Account, names: tuple[str, ...]) -> None:
        if account.names != names:
            account.names = names
            self._names = {}
            for each in self._accounts.values():
                for name in each.names:
                    self._names.setdefault(name, each.name)

    def _account(self, model: str) -> _Account:
        account = self._accounts.get(model)
        if account is None or account.limits is None:
            raise UnknownModel(model, self.models())
        return account

    def _move(self, account: _Account, held: int = 0, in_flight: int = 0, size: int = 0, arrived: float | None = None) -> None:
        self._held += held
        self._held_bytes += size
        account.held += held
        account.in_flight += in_flight
        account.begun += max(0, in_flight)
        account.held_bytes += size
        self._changed(account, arrived)
        self.on_change.tell(account.name)

    def _changed(self, account: _Account, arrived: float | None = None) -> None:
        """arrived: when the request came that is held from now on, if that is the change."""
        account.changed()
        pending = account.held + account.in_flight
        remote = account.remote_held + account.remote_in_flight
        elsewhere = account.elsewhere.pending + account.elsewhere.replicas
        asked = pending + remote + elsewhere > 0
        begins, account.asked = asked and not account.asked, asked
        turned = (asked or bool(account.elsewhere.unknown)) != account.turns % 2
        if turned:
            account.turns += 1
            account.quiet_since = self.activations.clock.now()
        unserved = account.ready == 0 and account.limits is not None
        wanting, wanting_here = unserved and pending > 0, unserved and pending + elsewhere > 0
        wanting_anywhere = unserved and pending + elsewhere + remote > 0
        edge, edge_here = wanting and not account.wanting, wanting_here and not account.wanting_here
        edge_anywhere = wanting_anywhere and not account.wanting_anywhere
        account.wanting, account.wanting_here, account.wanting_anywhere = wanting, wanting_here, wanting_anywhere
        if account.limits is None and not (pending or remote or account.elsewhere != NOTHING or account.replicas or account.watchers):
            self._accounts.pop(account.name, None)
        if edge:  # what is asked elsewhere has no first byte here to end an activation
            activation = self.activations.begin(account.name, arrived)
            if arrived is not None:
                activation.mark(Phase.HELD)
        if edge or edge_here:
            self.on_first_demand.tell(account.name)
        if edge_anywhere:
            self.on_first_demand_anywhere.tell(account.name)
        if begins:
            self.on_asked.tell(account.name)
        if turned and not account.turns % 2:
            self.on_quiet.tell(account.name)
