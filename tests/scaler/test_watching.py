"""`zerowake status --watch`: on a terminal it is drawn again, in a pipe changes alone are told."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from scaler.programs import watching
from scaler.view.state import Plan, Replica, ReplicaState, State

EMPTY = State(0.0, "1", "i", True, None, models=(), nodes=(), replicas=(), plan=Plan((), ()), activations=())
READY = replace(EMPTY, replicas=(Replica("r1", "chat", None, None, ReplicaState.READY, None, 0, None),))


class Ended(Exception):
    """No more is looked at."""


async def watched(states: list[State], *, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(watching, "_EVERY_SECONDS", 0.0)
    left = iter(states)

    async def look() -> State:
        for state in left:
            return state
        raise Ended

    file = io.StringIO()
    with pytest.raises(Ended):
        await watching.watch(look, Console(file=file, force_terminal=terminal, width=200, highlight=False, _environ={"TERM": "xterm"}))
    return file.getvalue()


async def test_in_a_pipe_each_change_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = await watched([EMPTY, EMPTY, READY, READY, EMPTY], terminal=False, monkeypatch=monkeypatch)
    assert [line.partition(" ")[2] for line in said.splitlines()] == ["replica r1 of chat: ready", "replica r1 of chat: gone"]


async def test_on_a_terminal_all_of_it_is_drawn_at_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    said = await watched([EMPTY, READY, READY], terminal=True, monkeypatch=monkeypatch)
    assert said.count("REPLICA") >= 2 and "\x1b[" in said
