"""Activations: what a scale-up from zero spent its time on.

One activation begins when a request has to be held for a model with no ready replica, and ends at the first byte of an answer. Until then
whoever does a part of the work says so: `mark` for a moment that was reached (the phase lasted since the moment before it), `add` for a
length measured elsewhere (the agent's phases arrive with its answer). What no phase accounts for is shown as `unaccounted`, never spread
over others. Whoever shows activations is told of each one that has ended (`on_end`), or asks for the last ones.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock, token
from zerowake_shared.phases import Phase, in_order

_KEPT = 100


class Interval(NamedTuple):
    """When a phase was, by the activation's clock. seconds: what counts as its own; in the rest of the time another one went on."""

    begin: float
    end: float
    seconds: float


class TraceContext(NamedTuple):
    """The trace that an activation is part of, as W3C has it: told to whoever works for the activation."""

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        return self.traceparent.split("-")[1]


class Activation:
    """One scale-up. id: 12 hex digits; total and phases in seconds; outcome: "open", "served", or "abandoned" (nobody waits any more);
    origin: how its replica was made, as its agent says ("restored", "standby", "parked", "cold", …); empty: no agent has said it.
    trace: that of its first request, if traces are exported.

    Moments are those of the clock that it was made with.
    """

    __slots__ = ("_begun", "_clock", "_latest", "_phases", "began", "id", "model", "origin", "outcome", "reason", "total", "trace")

    def __init__(self, name: str, model: str, at: float, clock: Clock) -> None:
        self.id = name
        self.model = model
        self.began = clock.wall() - (clock.now() - at)  # for people
        self.outcome = "open"
        self.reason = ""
        self.origin = ""
        self.total = 0.0
        self.trace: TraceContext | None = None
        self._begun = self._latest = at
        self._phases: dict[str, Interval] = {}
        self._clock = clock

    def mark(self, phase: str, at: float | None = None) -> None:
        """The phase ended at `at` (default now); it lasted since the mark before, or the beginning.

        Only a phase's first mark counts.
        """
        moment = max(self._latest, self._clock.now() if at is None else at)
        if self._record(phase, Interval(self._latest, moment, moment - self._latest)):
            self._latest = moment

    def add(self, phase: str, seconds: float, begin: float | None = None, end: float | None = None) -> None:
        """The phase took `seconds`, from `begin` on (default: it ends now), with what else was done up to `end` (default: nothing). Of
        several replicas made at once the first one's phases count: it is the one that answers first.

        A newer agent may have phases that are not known here: they count, and are shown, as they are called.
        """
        took = max(0.0, seconds)
        since = self._clock.now() - took if begin is None else begin
        self._record(phase, Interval(since, since + took if end is None else max(since, end), took))

    def made(self, origin: str) -> None:
        """A replica is there that was made so. Of several the first one's origin counts, as its phases do."""
        if not self.origin and self.outcome == "open":
            self.origin = origin

    def _record(self, phase: str, interval: Interval) -> bool:
        if phase in self._phases or self.outcome != "open":
            return False
        self._phases[phase] = interval
        return True

    @property
    def seconds(self) -> float:
        """That it took, or has taken so far."""
        return self._clock.now() - self._begun if self.outcome == "open" else self.total

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds by phase, in the order in which they come, and `unaccounted` once it has ended."""
        ordered = {phase: self._phases[phase].seconds for phase in in_order([*self._phases])}
        return MappingProxyType(ordered if self.outcome == "open" else _with_rest(ordered, self.total))

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """When each phase was, in seconds since its beginning and never outside of it, the earliest first."""
        last = self.seconds
        found = {}
        for phase in sorted(in_order([*self._phases]), key=lambda each: self._phases[each].begin):
            begin, end, seconds = self._phases[phase]
            begin, end = (min(max(0.0, moment - self._begun), last) for moment in (begin, end))
            found[phase] = Interval(begin, end, seconds)
        return MappingProxyType(found)

    @property
    def ready(self) -> float | None:
        """The moment at which the request that was answered first went to a replica; None: none was answered."""
        interval = self._phases.get(Phase.FIRST_BYTE)
        return None if interval is None else interval.begin

    def within(self, since: float, until: float) -> Mapping[str, float]:
        """As `phases`, of what lay between two moments of the clock: somebody may have begun to wait later than the activation did."""
        found = {}
        for phase in in_order([*self._phases]):
            begin, end, seconds = self._phases[phase]
            if end > since and begin < until:
                found[phase] = min(seconds, min(end, until) - max(begin, since))
        return MappingProxyType(_with_rest(found, until - since))

    def end(self, outcome: str, reason: str, at: float) -> None:
        self.total = at - self._begun
        self.outcome, self.reason = outcome, reason


def _with_rest(phases: dict[str, float], total: float) -> dict[str, float]:
    # Weights move beside the image, and count what they took longer: so all of them come one after the other.
    return {**phases, Phase.UNACCOUNTED: max(0.0, total - sum(phases.values()))}


class Activations:
    """The open activation of every model, and the last ones that ended."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, chance: random.Random = SYSTEM_CHANCE) -> None:
        self.clock = clock
        self._chance = chance
        self._open: dict[str, Activation] = {}
        self._recent: deque[Activation] = deque(maxlen=_KEPT)
        self._callbacks: list[Callable[[Activation], None]] = []

    def on_end(self, callback: Callable[[Activation], None]) -> None:
        """Calls `callback(activation)` for each activation that has ended. It is on the way of a request's first byte: keep it short."""
        self._callbacks.append(callback)

    def begin(self, model: str, at: float | None = None) -> Activation:
        """The model's open activation, or a new one that began at `at` (default now)."""
        activation = self._open.get(model)
        if activation is None:
            began = self.clock.now() if at is None else at
            activation = self._open[model] = Activation(token(self._chance, 6), model, began, self.clock)
        return activation

    def current(self, model: str) -> Activation | None:
        return self._open.get(model)

    def open(self) -> Sequence[Activation]:
        """Those that have not ended, the latest first."""
        return sorted(self._open.values(), key=lambda each: each.began, reverse=True)

    def recent(self, n: int = 20) -> Sequence[Activation]:
        """Those that ended, the latest first."""
        return list(self._recent)[: -n - 1 : -1]

    def served(self, model: str, at: float | None = None) -> None:
        """The first byte of an answer is on its way. Without an open activation this changes nothing."""
        self._end(model, "served", "", at)

    def answered(self, model: str, handed: float, at: float) -> None:
        """A replica that got its request at `handed` has answered at `at`: the model is served."""
        activation = self._open.get(model)
        if activation is not None:
            activation.add(Phase.FIRST_BYTE, at - handed, handed)
            self.served(model, at)

    def abandoned(self, model: str, reason: str) -> None:
        """Nobody waits for the model any more, and nobody was answered."""
        self._end(model, "abandoned", reason, None)

    def _end(self, model: str, outcome: str, reason: str, at: float | None) -> None:
        activation = self._open.pop(model, None)
        if activation is None:
            return
        activation.end(outcome, reason, self.clock.now() if at is None else at)
        self._recent.append(activation)
        for callback in self._callbacks:
            callback(activation)
