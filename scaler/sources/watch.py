"""Has every source of every model read, and keeps the ledger told of what they say together.

    source ─ read, with a deadline ─► its last value and that value's age ─► Elsewhere, one a model ─► ledger

What counts:
- Requests of a model's sources are added to each other, and to what the gateways have. Replicas that a source asks for (cron) are a least
  number, as with KEDA's triggers: of several the highest, and none in addition to what is pending.
- A value is as old as the beginning of the reading that it came by. It counts until the next one, through failures and silence too, but no
  longer than three intervals, or 30 s if those are less (HOLD). After that the source is unknown, as it is before its first value.
- While a source of a model is unknown, what it would say is neither zero nor anything else. The model's replicas stay: it does not count as
  idle, and its scaler answers with an error instead of a number that would take some away (keda/external_scaler.py). Nor are any made for
  it. What is known, of the gateways and of its other sources, scales up as always. It is so for as long as the silence lasts: who has a
  model up for nothing sees why in `zerowake status` and by `zerowake_source_up`.
- Who tells a number by itself (push) says for how long it counts, instead.
- What is no number of requests (NaN, less than zero, another form) is a failed reading, and not a value.

After a failed reading the next one comes soon, then less and less often, down to every two intervals (5 to 15 s).
Rejected: zero after the hold, which would scale a model to zero because a network did not work; the last value for ever, which would keep a
burst's replicas; one task for all sources, where one that hangs keeps the others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scaler.books.demand import NOTHING, Elsewhere
from scaler.books.ledger import Ledger
from scaler.books.signal import Signal
from scaler.sources.metrics import ERRORS
from scaler.sources.source import Alone, Declaration, Engine, Lookup, Reading, SourceError, Surroundings, Tally
from zerowake_shared.background import ended, kept
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

READ_SECONDS = 10.0
HOLD_SECONDS, HOLD_INTERVALS = 30.0, 3
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 5.0, 15.0  # two intervals, and at least and at most this


@dataclass(frozen=True, slots=True)
class SourceState:
    """What is known of a source. name: unique among its model's; says: what it is of; reading: what counts of it, None: it is unknown.

    age_seconds: of its last value; None: it never had one. fault: why the last reading failed; empty: it did not. refused: it is never
    asked, and fault says why.
    """

    name: str
    says: str
    reading: Reading | None
    age_seconds: float | None
    fault: str
    refused: bool = False

    @property
    def up(self) -> bool:
        """Its last value counts, and nothing has failed since."""
        return self.reading is not None and not self.fault


class _Watched:
    """One source of one model."""

    def __init__(self, model: str, name: str, declared: Declaration) -> None:
        self.model = model
        self.name = name
        self.declared = declared
        self.reading: Reading | None = None  # what counts of it
        self.at: float | None = None  # the moment that its last value is of
        self.fault = declared.flaw
        self.expiry: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def title(self) -> str:
        return f"source {self.name} of model {self.model} ({self.declared.says})"

    @property
    def unknown(self) -> str:
        if self.declared.flaw:
            return f"source {self.name} of model {self.model} is refused: {self.fault}; replicas stay as they are"
        since = "was not heard of lately" if self.at is not None else "was not heard of so far"
        return f"{self.title} {since}{f': {self.fault}' if self.fault else ''}; replicas stay as they are"


class Sources:
    """All of them. read_seconds: what a reading may take; hold_seconds: how long a value counts at least (HOLD, above); engines: those of a
    model that the gateway knows; lookup, others: as in Surroundings."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock = SYSTEM_CLOCK,
        read_seconds: float = READ_SECONDS,
        hold_seconds: float = HOLD_SECONDS,
        engines: Callable[[str], Sequence[Engine]] = lambda _: (),
        lookup: Lookup | None = None,
        others: Callable[[str], Tally] = lambda _: Alone(),
    ) -> None:
        self.on_speech = Signal()  # sources of a model were declared, fell silent, or speak
        self._ledger = ledger
        self._around = Surroundings(clock, engines, lookup, others)
        self._now = clock.now
        self._read_seconds = read_seconds
        self._hold_seconds = hold_seconds
        self._models: dict[str, list[_Watched]] = {}
        self._unknown: dict[str, str] = {}  # of each model, as was told last
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Sources:
        return self

    async def __aexit__(self, *_: object) -> None:
        for model in list(self._models):
            self._forget(model)
        await ended(self._tasks)

    def declare(self, model: str, declared: Sequence[Declaration]) -> None:
        """These are the model's sources; those that it had before are forgotten."""
        self._forget(model)
        if declared:
            self._models[model] = [_Watched(model, name, each) for name, each in _named(declared).items()]
            for watched in self._models[model]:
                ERRORS.labels(model, watched.name)
                if watched.declared.every_seconds is None:
                    continue
                task = asyncio.create_task(kept(functools.partial(self._read, watched), watched.title, log), name=watched.title)
                watched.task = task
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self._tell(model)

    def told(self, model: str, declared: Declaration, reading: Reading, hold_seconds: float) -> bool:
        """The source of the model that is declared so says this, for so many seconds. False: the model has none."""
        watched = self._declared(model, declared)
        if watched is not None:
            self._heard(watched, reading, self._now(), hold_seconds)
        return watched is not None

    def misled(self, model: str, declared: Declaration, why: str) -> None:
        """The source of the model that is declared so, if there is one, has said what is of no use."""
        if (watched := self._declared(model, declared)) is not None:
            self._failed(watched, why)

    def _declared(self, model: str, declared: Declaration) -> _Watched | None:
        return next((each for each in self._models.get(model, []) if each.declared == declared), None)

    def states(self) -> Mapping[str, list[SourceState]]:
        """Of every source, by model."""
        return {model: self.states_of(model) for model in self._models}

    def states_of(self, model: str) -> list[SourceState]:
        """Of its sources; none: it has none."""
        return [self._state(each) for each in self._models.get(model, [])]

    def _state(self, watched: _Watched) -> SourceState:
        age = None if watched.at is None else self._now() - watched.at
        return SourceState(watched.name, watched.declared.says, watched.reading, age, watched.fault, bool(watched.declared.flaw))

    def _forget(self, model: str) -> None:
        for watched in self._models.pop(model, []):
            if watched.task:
                watched.task.cancel()
            if watched.expiry:
                watched.expiry.cancel()
            with contextlib.suppress(KeyError):
                ERRORS.remove(model, watched.name)

    async def _read(self, watched: _Watched) -> None:
        source, every = watched.declared.open(watched.model, self._around), watched.declared.every_seconds or 0.0
        least, most = _LAST_RETRY_SECONDS
        backoff = Backoff(_FIRST_RETRY_SECONDS, min(max(2 * every, least), most))
        try:
            while True:
                began = self._now()
                try:
                    async with asyncio.timeout(self._read_seconds):
                        reading = await source.read()
                except TimeoutError:
                    self._failed(watched, f"no answer within {self._read_seconds:g} s")
                except SourceError as error:
                    self._failed(watched, str(error))
                else:
                    backoff.reset()
                    again = every if reading.again_seconds is None else reading.again_seconds
                    self._heard(watched, reading, began, max(self._hold_seconds, HOLD_INTERVALS * max(every, again)))
                    await asyncio.sleep(max(0.0, began + again - self._now()))
                    continue
                await asyncio.sleep(backoff.next())
        finally:
            await source.close()

    def _heard(self, watched: _Watched, reading: Reading, at: float, hold: float) -> None:
        if watched.fault:
            log.info("%s is heard of again", watched.title)
        watched.fault = ""
        watched.reading, watched.at = reading, at
        if watched.expiry:
            watched.expiry.cancel()
        watched.expiry = asyncio.get_running_loop().call_later(at + hold - self._now(), self._expired, watched)
        self._tell(watched.model)

    def _failed(self, watched: _Watched, why: str) -> None:
        ERRORS.labels(watched.model, watched.name).inc()
        if why != watched.fault:
            log.warning("%s: %s", watched.title, why)
        watched.fault = why
        if watched.reading is None:
            self._tell(watched.model)

    def _expired(self, watched: _Watched) -> None:
        watched.reading = None
        log.warning("%s", watched.unknown)
        self._tell(watched.model)

    def _tell(self, model: str) -> None:
        watched = self._models.get(model, [])
        readings = [each.reading for each in watched if each.reading]
        told = Elsewhere(
            sum(each.pending for each in readings),
            max((each.replicas for each in readings), default=0),
            "; ".join(each.unknown for each in watched if each.reading is None),
        )
        self._ledger.set_elsewhere(model, told if watched else NOTHING)
        before = self._unknown.pop(model, None)
        if watched:
            self._unknown[model] = told.unknown
        if before != self._unknown.get(model):
            self.on_speech.tell(model)


def _named(declared: Sequence[Declaration]) -> Mapping[str, Declaration]:
    """By type, and from the second one of it on with its number: `redis`, `redis-2`."""
    named: dict[str, Declaration] = {}
    for each in declared:
        number = 1 + sum(other.type == each.type for other in named.values())
        named[each.type if number == 1 else f"{each.type}-{number}"] = each
    return named
