"""The example of scaler/README.md, "Size the pools: an example": its file and its command print the very table that stands there."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.worlds.command import zerowake
from tests.worlds.readme_commands import ROOT

TITLE = "Size the pools: an example"


async def test_it_prints_what_stands_there(tmp_path: Path) -> None:
    section = (ROOT / "scaler/README.md").read_text().partition(f"### {TITLE}\n")[2].partition("\n## ")[0]
    _, yaml, _, command, _, table, _ = section.split("```")
    (tmp_path / "pools.yaml").write_text(yaml.removeprefix("yaml\n"))
    program, *words = shlex.split(command)
    assert program == "zerowake"
    shown = await zerowake(*[str(tmp_path / word) if word == "pools.yaml" else word for word in words])
    assert [line.rstrip() for line in shown.splitlines()] == table.strip().splitlines()
