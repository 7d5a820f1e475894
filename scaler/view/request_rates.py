"""How many requests a second each model's replicas are given by this gateway: what its ledger has counted, over the last minute."""

from __future__ import annotations

import asyncio
from collections import deque

from scaler.books.ledger import Ledger
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_EVERY_SECONDS, _LOOKS = 5.0, 12  # a minute


class RequestRates:
    """`run` looks at the ledger from time to time; until it has, rates are over a shorter time."""

    def __init__(self, ledger: Ledger, clock: Clock = SYSTEM_CLOCK) -> None:
        self._ledger = ledger
        self._clock = clock
        self._looks: deque[tuple[float, dict[str, int]]] = deque(maxlen=_LOOKS)
        self.look()

    def look(self) -> None:
        """Notes what is counted so far."""
        self._looks.append((self._clock.now(), {model: begun for model in self._ledger.models() if (begun := self._ledger.begun(model))}))

    def of(self, model: str) -> float:
        """Requests a second; 0 within the first second."""
        at, begun = self._looks[0]
        seconds = self._clock.now() - at
        # A model that was withdrawn and declared anew is counted from the beginning.
        return max(0, self._ledger.begun(model) - begun.get(model, 0)) / seconds if seconds >= 1.0 else 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            self.look()
