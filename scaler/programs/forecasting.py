"""The forecast of a running scaler: the ledger's edges feed it, each minute judges it, and a file keeps it. It informs
whoever asks to be told of each minute: fleet/staging_ahead.py, which moves bytes by it.

Who asks for a model past this gateway counts like who asks here: a forecast is of what all gateways and sources see.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaler.books.ledger import Ledger
from scaler.forecast.explained import explained
from scaler.forecast.forecast import STATEMENT_SECONDS, Forecast
from scaler.forecast.state_file import decoded, encoded, load, save
from scaler.plan.ahead import WITHIN_SECONDS
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_PAUSE_SECONDS = STATEMENT_SECONDS + 0.5  # the minute is over by then, also by a wall clock that is being slowed
_MINUTES_BETWEEN_SAVES = 10
_SAVE_SECONDS = 30.0
_LOOK_SECONDS = 10.0


class Forecasting:
    """file: where the forecast is kept from one run to the next; None: it begins anew with each."""

    def __init__(self, ledger: Ledger, file: Path | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self._ledger = ledger
        self._file = file
        self._wall = clock.wall
        self._asked: set[str] = set()
        self._likely: Mapping[str, float | None] = {}
        self._looked_at = -math.inf
        self._judged: Callable[[], None] = lambda: None
        state = load(file) if file else None
        self.forecast = Forecast.restored(state, self._wall()) if state else Forecast()
        for model in (*self.forecast.models, *ledger.models()):
            self._declared(model)
        ledger.on_declaration(self._declared)
        ledger.on_asked(self._began)
        ledger.on_quiet(self._ended)

    def on_judged(self, callback: Callable[[], None]) -> None:
        """Calls `callback()` after each minute that was judged."""
        self._judged = callback

    def explained(self, model: str) -> dict[str, Any] | None:
        """Every term of the model's chance of a request, as it is now; None: it is not known."""
        found = explained(self.forecast, model, self._wall(), WITHIN_SECONDS)
        return asdict(found) if found is not None else None

    def next_likely(self) -> Mapping[str, float | None]:
        """As the forecast has it, or had it within the last ten seconds."""
        at = self._wall()
        if not 0.0 <= at - self._looked_at < _LOOK_SECONDS:
            self._likely, self._looked_at = self.forecast.next_likely(at), at
        return self._likely

    async def told(self) -> bytes:
        """All that it knows, for another replica."""
        return await asyncio.to_thread(encoded, self.forecast.state())

    async def adopt(self, content: bytes) -> bool:
        """What another replica has told, if that has seen more; whether it has. Raises: ValueError: it is of no use."""
        state = await asyncio.to_thread(decoded, content)
        if state.score.statements <= self.forecast.score.statements:
            return False
        self.forecast.adopt(state, self._wall())
        for model in self.forecast.models:
            self._declared(model)
        return True

    async def run(self) -> None:
        """Judges it each minute and saves it from time to time, and at the end: runs until it is cancelled."""
        try:
            while True:
                for _ in range(_MINUTES_BETWEEN_SAVES):
                    await asyncio.sleep(_PAUSE_SECONDS)
                    self.forecast.judge(self._wall())
                    self._judged()
                await self._save()
        finally:
            await self._save()

    async def _save(self) -> None:
        if self._file is None:
            return
        try:
            async with asyncio.timeout(_SAVE_SECONDS):
                await asyncio.to_thread(save, self._file, self.forecast.state())
        except OSError as error:  # no answer from the disk in time among them
            why = str(error) or f"the disk has not answered for {_SAVE_SECONDS:.0f} s"
            log.warning(
                "the forecast cannot be kept in %s (%s): what was learned since the last time is lost with this program", self._file, why
            )

    def _began(self, model: str) -> None:
        self._asked.add(model)
        self.forecast.began(model, self._wall())

    def _ended(self, model: str) -> None:
        """It may be that a source which was silent says so, and that nobody had asked."""
        if model in self._asked:
            self._asked.remove(model)
            self.forecast.ended(model, self._wall())

    def _declared(self, model: str) -> None:
        if not self._ledger.knows(model):
            self.forecast.withdraw(model)
            self._asked.discard(model)
            return
        now = self._wall()
        self.forecast.declare(model, now)
        if self._ledger.demand_anywhere(model).pending:
            self._began(model)
