"""How far long work is: a bar on a terminal; elsewhere (a pipe, a file, CI's log) a plain line now and again, on stderr as the bar is."""

from __future__ import annotations

from collections.abc import AsyncIterable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from zerowake_proto import agent_pb2

from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_EVERY_SECONDS = 5.0  # between two plain lines; work that is over sooner has none


class Bar:
    """One piece of work, while `with` lasts."""

    def __init__(self, *columns: ProgressColumn, console: Console | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
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
        """`done`, `total`: bytes; a total of 0: they are not counted."""
        self._bars.update(self._task, description=what, total=total or None, completed=done)
        if self._bars.disable and self._clock.now() - self._last >= _EVERY_SECONDS:
            self._last = self._clock.now()
            far = f": {done / 1e6:.1f} of {total / 1e6:.1f} MB" if total else ""
            self._console.print(f"{what}{far}", markup=False, highlight=False, emoji=False, soft_wrap=True)


def of_steps() -> Bar:
    """Of work in steps, some of which count bytes."""
    return Bar(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())


async def transferred(what: str, updates: AsyncIterable[agent_pb2.TransferUpdate]) -> agent_pb2.TransferResult:
    """The result of a transfer; a bar and a rate until it is there."""
    result = None
    with Bar(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
        async for update in updates:
            if update.HasField("result"):
                result = update.result
            else:
                bar.show(what, update.progress.done_bytes, update.progress.total_bytes)
    assert result is not None
    return result
