"""Which models cannot be started: their requests are refused at once, instead of after all of the time that they may be held for.

A model counts as one that cannot start after several starts in a row have failed, and gone on to for a while: what is short for a moment
(a port, a GPU's memory that is not free yet) does not count. It is tried further, at the pace of whoever starts it, and to that end one
request is held at a time: the demand of one is what keeps a model from being left at zero. The first replica that is ready ends it.
Rejected: refusing all, since then nobody asks for a start any more; a count without a time, which three failures within a second reach.
"""

from __future__ import annotations

from dataclasses import dataclass

STARTS = 3
SECONDS = 10.0  # between the first failure and the last
PAUSE_SECONDS = 5.0  # since the last failure, before a request is held again


class CannotStart(Exception):
    """The model has failed to start again and again: a request is not held for it. The message says why."""


@dataclass(slots=True)
class _Row:
    """Starts of a model that failed, one after the other. first, last: when, in seconds of the loop."""

    count: int
    first: float
    last: float
    reason: str


class FailedStarts:
    """Counts starts that failed. All moments are seconds of one clock."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}

    def failed(self, model: str, reason: str, now: float) -> None:
        row = self._rows.setdefault(model, _Row(0, now, now, reason))
        row.count += 1
        row.last, row.reason = now, reason

    def forget(self, model: str) -> None:
        """It has started, or is another one by now."""
        self._rows.pop(model, None)

    def hopeless(self, model: str) -> str:
        """Why the model cannot start; empty: it can, as far as is known."""
        row = self._rows.get(model)
        if row is None or row.count < STARTS or row.last - row.first < SECONDS:
            return ""
        return (
            f"model {model!r} cannot start: {row.count} tries in {row.last - row.first:.0f} s failed, the last one: {row.reason}"
            "; it is tried further, for one request at a time"
        )

    def check(self, model: str, now: float, *, tried: bool) -> None:
        """tried: a request is held for it. Raises: CannotStart if another one is not to be held."""
        why = self.hopeless(model)
        if why and (tried or now - self._rows[model].last < PAUSE_SECONDS):
            raise CannotStart(why)
