"""`zerowake trace` on a terminal: an activation's phases as bars below each other, where they were and as long as they took."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from rich.console import Console

from scaler.view.state import Activation
from zerowake_shared import tables
from zerowake_shared.phases import Phase

_BAR, _GAP = "█", "░"
_WIDEST, _NARROWEST = 60, 10  # columns of the bars
_BESIDE = 34  # columns that the rest takes


def show(console: Console, activation: Activation) -> None:
    """All of it: whose it was, and where its time went."""
    at = datetime.datetime.fromtimestamp(activation.began, datetime.UTC).astimezone().isoformat(" ", "milliseconds")
    lines = [
        ("activation", activation.id),
        ("model", activation.model),
        ("began", at),
        ("outcome", activation.outcome + (f": {activation.reason}" if activation.reason else "")),
        ("origin", activation.origin or "not known"),
        *([("trace", activation.trace)] if activation.trace else []),
        ("took", f"{1000 * activation.seconds:.1f} ms{' so far' if activation.outcome == 'open' else ''}"),
    ]
    for name, text in lines:
        console.print(f"{name + ':':13}{text}", soft_wrap=True)
    console.print()
    width = max(_NARROWEST, min(_WIDEST, console.width - _BESIDE))
    bars = tables.table("PHASE", "AT (ms)", "MS", "")
    for column in bars.columns[1:3]:
        column.justify = "right"
    covered: set[int] = set()
    for phase in activation.phases:
        columns = columns_of(phase.begins_seconds, phase.seconds, activation.seconds, width)
        covered.update(columns)
        bars.add_row(phase.name, f"{1000 * phase.begins_seconds:.1f}", f"{1000 * phase.seconds:.1f}", _drawn(columns, _BAR))
    if activation.unaccounted_seconds is not None:
        gaps = [column for column in range(width) if column not in covered]
        bars.add_row(Phase.UNACCOUNTED, "", f"{1000 * activation.unaccounted_seconds:.1f}", _drawn(gaps, _GAP))
    console.print(bars)


def columns_of(begins: float, took: float, whole: float, width: int) -> range:
    """Of `width` columns that stand for `whole` seconds; one column at least for what took any time, and none outside."""
    if whole <= 0 or took <= 0:
        return range(0)
    first = min(width - 1, int(width * begins / whole))
    return range(first, min(width, max(first + 1, round(width * (begins + took) / whole))))


def _drawn(columns: Iterable[int], mark: str) -> str:
    drawn = set(columns)
    return "".join(mark if column in drawn else " " for column in range(max(drawn, default=-1) + 1))
