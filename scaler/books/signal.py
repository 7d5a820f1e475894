"""Who wants to hear of a model, in the same turn of the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Signal:
    """Called with a function, it tells that function from then on: `ledger.on_change(print)`."""

    __slots__ = ("_callbacks",)

    def __init__(self) -> None:
        self._callbacks: list[Callable[[str], None]] = []

    def __call__(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    def tell(self, model: str) -> None:
        """Calls all of them. What one of them raises is logged: a listener's fault must not cost a client its request."""
        for callback in self._callbacks:
            try:
                callback(model)
            except Exception:
                log.exception("a listener failed", extra={"fields": {"model": model}})
