"""Which of a machine's parts there are where not all of it runs; with all of it running: test_bundle.py."""

from __future__ import annotations

from pathlib import Path

from scaler.programs import parts
from zerowake_shared.bundle import gathered
from zerowake_shared.checkup import Subject


async def test_nothing_runs_and_no_file_was_named(tmp_path: Path) -> None:
    found, missing = await gathered([each for each in parts.PARTS if not each.of_cluster], Subject(tmp_path, Path("/nowhere")))
    assert (found.keys(), missing) == ({"versions.json"}, [])


async def test_who_does_not_answer_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text("metrics: 127.0.0.1:1\nmodels: {m: {command: [sh], port: 8000}}\n")
    subject = Subject(tmp_path, Path("/nowhere"), file=file)
    assert await parts.metrics(subject) == {}
    (tmp_path / "owner.lock").write_text("4194305")  # a number that no process has
    assert parts.logs(subject) == {}
    assert parts.config(subject).keys() == {"zerowake.yaml.json"}
