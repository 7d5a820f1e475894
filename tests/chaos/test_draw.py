"""The draw of the fault run: the same faults in every run of a seed, from wherever it goes on, and every kind among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import VICTIMS, WEIGHTS, draw
from tests.chaos.journal import append, read
from tests.chaos.planted.sitecustomize import PLANTS
from tests.chaos.strikes import Strikes

ROOT = Path(__file__).parents[2]


def test_it_is_the_same_whenever_it_is_drawn() -> None:
    backwards = [draw(7, number) for number in reversed(range(50))]
    assert backwards == [draw(7, number) for number in range(50)][::-1]
    assert backwards != [draw(8, number) for number in reversed(range(50))]


def test_a_thousand_have_every_kind_and_every_victim() -> None:
    drawn = [draw(1, number) for number in range(1000)]
    assert {fault.kind for fault in drawn} == set(WEIGHTS)
    assert (
        {fault.victim for fault in drawn if fault.kind == "kill"}
        == {fault.victim for fault in drawn if fault.kind == "stop"}
        == set(VICTIMS)
    )


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
