"""A ledger that knows one model, m, and one source of it that is read every tenth of a second."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

from scaler.books.demand import Elsewhere
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway.dispatcher import Dispatcher
from scaler.sources.engine_metrics import engines_of
from scaler.sources.source import Declaration, Lookup
from scaler.sources.watch import Sources, SourceState
from tests.worlds.waiting import until

OFTEN = 0.1


@dataclass
class AskedElsewhere:
    ledger: Ledger
    sources: Sources

    @property
    def told(self) -> Elsewhere:
        return self.ledger.demand_anywhere("m").elsewhere

    @property
    def state(self) -> SourceState:
        (state,) = self.sources.states()["m"]
        return state

    async def says(self, pending: int) -> None:
        """Waits for the source to say so, now."""
        await until(lambda: self.told == Elsewhere(pending) and self.state.up, f"{pending} requests are told of")

    async def fails(self, why: str) -> None:
        """Waits for a reading to fail so."""
        await until(lambda: why in self.state.fault, f"it fails by {why!r}")

    async def falls_silent(self, why: str) -> None:
        """Waits until the last value counts no more."""
        await until(lambda: why in self.told.unknown, f"it is unknown by {why!r}")
        assert (self.told.pending, self.state.reading, self.state.up) == (0, None, False)


@contextlib.asynccontextmanager
async def asked_elsewhere(
    declared: Declaration,
    read_seconds: float = 10.0,
    hold_seconds: float = 30.0,
    dispatcher: Dispatcher | None = None,
    lookup: Lookup | None = None,
) -> AsyncIterator[AskedElsewhere]:
    """dispatcher: the gateway's, which knows the model's replicas. lookup: where hosts are."""
    ledger = Ledger({"m": ModelLimits()})
    engines = functools.partial(engines_of, dispatcher) if dispatcher else lambda _: ()
    async with Sources(ledger, read_seconds=read_seconds, hold_seconds=hold_seconds, engines=engines, lookup=lookup) as sources:
        sources.declare("m", [declared])
        yield AskedElsewhere(ledger, sources)


async def silent_and_back(declared: Declaration, process: int, pending: int, dispatcher: Dispatcher | None = None) -> None:
    """The process that answers stands still for longer than its last value counts, and goes on. pending: what it says before and after."""
    async with asked_elsewhere(declared, read_seconds=0.5, hold_seconds=1, dispatcher=dispatcher) as asked:
        await asked.says(pending)
        os.kill(process, signal.SIGSTOP)
        try:
            await asked.fails("no answer within 0.5 s")
            await asked.falls_silent("no answer within 0.5 s")
        finally:
            os.kill(process, signal.SIGCONT)
        await asked.says(pending)
