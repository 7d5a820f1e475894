"""What one agent writes down of engines that sleep is what the next one reads, also where it was killed as it wrote."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.sequences.sleep_notes import Note, SleepNotes
from restore_agent.sequences.standby import Rung


def standby(rung: Rung) -> Any:
    gpus: dict[str, Any] = {"gpus": {"GPU-1": 5}, "before": ("GPU-1", "GPU-2"), "places": {"GPU-0": "GPU-1"}}
    return SimpleNamespace(rung=rung, gpu_pids=[7, 8], processes=[7, 8, 9], **gpus)


@pytest.fixture
def notes(tmp_path: Path) -> SleepNotes:
    made = SleepNotes(tmp_path / "sleepers")
    made.prune()
    return made


def test_what_stands_is_told_from_what_was_on_its_way(notes: SleepNotes) -> None:
    assert notes.read("pod.1") is None
    notes.moves("pod.1", os.getpid())
    moving = notes.read("pod.1")
    assert moving and moving.stands is None
    notes.stands("pod.1", os.getpid(), standby(Rung.STANDBY))
    assert notes.read("pod.1") == Note(os.getpid(), "standby", (7, 8), {"GPU-1": 5}, ("GPU-1", "GPU-2"), (7, 8, 9), {"GPU-0": "GPU-1"})
    notes.forget("pod.1")
    notes.forget("pod.1")
    assert notes.read("pod.1") is None


def test_what_is_no_note_counts_for_none(notes: SleepNotes, tmp_path: Path) -> None:
    foreign = '{"pid": 1, "gpu_pids": [], "before": [], "processes": [], "rung": "of a newer agent"}'
    other = '{"pid": 1, "gpu_pids": [], "before": [], "other": 1}'
    for number, text in enumerate((b"", b"\xff", b"[]", b"{}", b'{"pid": 1}', other.encode(), foreign.encode())):
        (tmp_path / f"sleepers/pod.{number}").write_bytes(text)
        assert notes.read(f"pod.{number}") is None


def test_containers_that_ended_without_an_agent_are_forgotten(notes: SleepNotes, tmp_path: Path) -> None:
    notes.stands("here.1", os.getpid(), standby(Rung.PARKED))
    notes.stands("gone.1", 2**22 + 1, standby(Rung.PARKED))  # the kernel gives no such pid
    (tmp_path / "sleepers/.half").write_text("{")
    SleepNotes(tmp_path / "sleepers").prune()
    assert [path.name for path in (tmp_path / "sleepers").iterdir()] == ["here.1"]
