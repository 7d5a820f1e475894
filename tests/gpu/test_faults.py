"""The faults that a seed draws, as they are run on a GPU: here on the host's memory, where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench.gpu import faults, results
from tests.worlds.needs import missing_for_criu


async def test_each_comes_in_the_middle_of_a_call_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing := missing_for_criu():
        pytest.skip(missing)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["faults", "--faults", "3", "--seed", "5"])
    assert await faults.main() == 0
    said = capsys.readouterr().out
    assert "   3 " in said and "faults after which all is what it was" in said, said
    for kept in tmp_path.glob("faults-*.json"):  # of a GPU
        assert len(json.loads(kept.read_text())["faults"]) == 3
