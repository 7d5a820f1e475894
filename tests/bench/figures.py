"""What a benchmark brings back, and the table it is printed in.

A benchmark is a module of this package with a `main()`, plain or a coroutine, that returns its figures; `python -m tests.bench` finds it
by that. It measures the real thing, and leaves nothing behind.
"""

import asyncio
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number. `value` is in `unit`; a goal is a bound on it, in the same unit; neither bound: it is only stated.

    `detail` says how it came about, for a reader: sample count, spread, what it is compared with.
    """

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    detail: str = ""

    @property
    def goal(self) -> str:
        bounds = [f"{sign} {bound:g} {self.unit}" for sign, bound in (("≤", self.at_most), ("≥", self.at_least)) if bound is not None]
        return " and ".join(bounds) or "stated"

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (self.at_least is None or self.value >= self.at_least)


VERDICTS = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}


def table(figures: list[Figure]) -> Table:
    """The figures as they are shown at the end of a run."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("figure", "measured", "goal", "", "how"):
        shown.add_column(heading, justify="right" if heading in ("measured", "goal") else "left")
    for figure in figures:
        shown.add_row(figure.name, f"{figure.value:.4g} {figure.unit}", figure.goal, VERDICTS[figure.met], figure.detail)
    return shown


def measure(name: str) -> list[Figure]:
    """Runs the benchmark of that name in this process (not in `__main__`, which a fresh process cannot import)."""
    made = import_module(f"{__package__}.{name}").main()
    figures: Iterable[Figure] = asyncio.run(made) if inspect.iscoroutine(made) else made
    return list(figures)
