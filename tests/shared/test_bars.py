"""What long work shows of itself, on a terminal and in a pipe."""

from __future__ import annotations

import io

from rich.console import Console
from rich.progress import TextColumn

from tests.worlds.virtual_time import StandingClock
from zerowake_shared.bars import Bar


def test_a_pipe_gets_a_plain_line_now_and_again() -> None:
    pipe, clock = io.StringIO(), StandingClock()
    with Bar(TextColumn("{task.description}"), console=Console(file=pipe), clock=clock) as bar:
        for second in range(13):
            clock.moment = float(second)
            bar.show("pulling [small]", second * 10_000_000, 120_000_000)
    assert pipe.getvalue() == "pulling [small]: 50.0 of 120.0 MB\npulling [small]: 100.0 of 120.0 MB\n"


def test_a_step_that_counts_nothing_is_named_alone() -> None:
    pipe, clock = io.StringIO(), StandingClock()
    with Bar(console=Console(file=pipe), clock=clock) as bar:
        bar.show("starting the engine", 0, 0)
        clock.moment = 6.0
        bar.show("waiting for its health, which takes a while " * 5, 0, 0)
    assert pipe.getvalue() == "waiting for its health, which takes a while " * 5 + "\n", "one line, however long it is"


def test_a_terminal_gets_a_bar_that_is_gone_afterwards() -> None:
    terminal = io.StringIO()
    with Bar(TextColumn("{task.description}"), console=Console(file=terminal, force_terminal=True), clock=StandingClock()) as bar:
        bar.show("pulling small", 1, 2)
    assert "pulling small" in terminal.getvalue() and terminal.getvalue().endswith("\x1b[2K")


def test_what_counts_no_bytes_shows_its_share() -> None:
    pipe, clock = io.StringIO(), StandingClock()
    with Bar(console=Console(file=pipe), clock=clock, counts_bytes=False) as bar:
        clock.moment = 5.0
        bar.show("lru, 1 of 7", 1000, 3000)
    assert pipe.getvalue() == "lru, 1 of 7: 33 %\n"
