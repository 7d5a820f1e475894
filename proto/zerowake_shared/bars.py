"""How far long work is: a bar on a terminal; elsewhere (a pipe, a file, CI's log) a plain line now and again, on stderr as the bar is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_EVERY_SECONDS = 5.0  # between two plain lines; work that is over sooner has none


class Bar:
    """One piece of work, while `with` lasts."""

    def __init__(
        self, *columns: ProgressColumn, console: Console | None = None, clock: Clock = SYSTEM_CLOCK, counts_bytes: bool = True
    ) -> None:
        self._counts_bytes = counts_bytes
        self._console = console or Console(stderr=True)
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bars.add_task("", total=None)
        self._clock = clock
        self._last = clock.now()

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """`done`, `total`: bytes, or what is counted instead; a total of 0: nothing is."""
        self._bars.update(self._task, description=what, total=total or None, completed=done)
        if self._bars.disable and self._clock.now() - self._last >= _EVERY_SECONDS:
            self._last = self._clock.now()
            far = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB" if self._counts_bytes else f"{100 * done // max(total, 1)} %"
            self._console.print(f"{what}: {far}" if total else what, markup=False, highlight=False, emoji=False, soft_wrap=True)


def of_steps() -> Bar:
    """Of work in steps, some of which count bytes."""
    return Bar(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())


def of_bytes() -> Bar:
    """Of work that reads or writes so many bytes."""
    return Bar(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())


def of_shares() -> Bar:
    """Of work that counts something else than bytes: its share is shown."""
    return Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), counts_bytes=False)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Of work that counts nothing, while the block lasts: on a terminal alone."""
    with Console(stderr=True).status(Text(what)):
        yield
