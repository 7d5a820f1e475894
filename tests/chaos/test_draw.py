"""The draw of the fault run: the same faults in every run of a seed, from wherever it goes on, and every kind among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import WEIGHTS, draw
from tests.chaos.journal import append, read
from tests.chaos.moments import NOT_PASSED, STRIKES, STRUCK
from tests.chaos.planted.sitecustomize import PLANTS
from tests.chaos.strikes import Strikes
from zerowake_shared.phases import Phase

ROOT = Path(__file__).parents[2]
_TELLING = """
import os
import sitecustomize
from restore_agent.sequences.phases import Phases
from scaler.books.activation import Activation
from zerowake_shared.clock import SYSTEM_CLOCK
from zerowake_shared.phases import Phase

with Phases().phase(Phase.STAGED):
    os.write(sitecustomize.phases, b"in it\\n")
activation = Activation("id", "model", 0.0, SYSTEM_CLOCK)
activation.mark(Phase.HELD)
activation.mark(Phase.HELD)
"""


def test_it_is_the_same_whenever_it_is_drawn() -> None:
    backwards = [draw(7, number) for number in reversed(range(50))]
    assert backwards == [draw(7, number) for number in range(50)][::-1]
    assert backwards != [draw(8, number) for number in reversed(range(50))]


def test_a_thousand_have_every_kind_and_every_process_at_every_phase() -> None:
    drawn = [draw(1, number) for number in range(1000)]
    assert {fault.kind for fault in drawn} == set(WEIGHTS)
    for kind in ("kill", "stop"):
        assert {(fault.victim, fault.moment) for fault in drawn if fault.kind == kind} == set(STRIKES)


@pytest.mark.parametrize("phase", Phase)
def test_a_phase_is_struck_or_cannot_be_for_a_reason(phase: Phase) -> None:
    assert (phase in STRUCK) != bool(NOT_PASSED.get(phase))


def test_a_machine_tells_of_phases(tmp_path: Path) -> None:
    """Those of the agent as they begin, those of the scaler as they are reached."""
    journal = tmp_path / "phases"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).with_name("planted")), "ZEROWAKE_CHAOS_PHASES": str(journal)}
    subprocess.run([sys.executable, "-c", _TELLING], env=env, cwd=ROOT, check=True)
    assert journal.read_text() == "staged\nin it\nheld\n"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_each_kind_can_be_done(kind: str) -> None:
    assert hasattr(Strikes, f"_{kind.replace(' ', '_').replace('-', '_')}")


def test_a_journal_that_was_torn_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    append(tmp_path / "journal", number=1)
    append(tmp_path / "journal", number=2)
    with (tmp_path / "journal").open("a") as file:
        file.write('{"number": 3')
    assert [line["number"] for line in read(tmp_path / "journal")] == [1, 2]


@pytest.mark.parametrize("plant", PLANTS)
def test_each_bug_can_be_planted(plant: str) -> None:
    """What it replaces is there: a program that imports the module has it planted."""
    code = f"import importlib, sitecustomize; importlib.import_module(sitecustomize.PLANTS[{plant!r}][0]); print(sitecustomize.planted)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).with_name("planted")), "ZEROWAKE_CHAOS_PLANT": plant}
    ran = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == f"['{plant}']", ran.stderr
