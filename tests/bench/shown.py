"""How a benchmark that is a command of its own ends."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from tests.bench.__main__ import RESULTS, keep
from tests.bench.figures import Figure, table


def shown(console: Console, figures: list[Figure], kept_as: str, command: str, more: Mapping[str, object]) -> int:
    """Prints the table, and keeps it in `results/` under that name; empty: not. Returns the exit status: 1 where a goal is missed."""
    console.print(table(figures))
    if kept_as:
        console.print(f"kept in {keep(figures, RESULTS / f'{kept_as}.json', command, more)}")
    return 0 if all(figure.met is not False for figure in figures) else 1
