"""What a bug report has of gpumem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpumem.programs.parts import PARTS
from tests.worlds.gpumem_server import Served
from zerowake_shared.bundle import gathered
from zerowake_shared.checkup import Subject


async def test_its_status_where_it_runs(server: Served, tmp_path: Path) -> None:
    found, missing = await gathered(PARTS, Subject(tmp_path, server.socket))
    status: Any = found["gpumem.json"]
    assert (status["devices"][0]["identity"], missing) == ("host", [])
    assert await gathered(PARTS, Subject(tmp_path, tmp_path / "none")) == ({}, [])
