"""What a bug report has of the agent: manifests that are whole but for what users ask, and never a key."""

from __future__ import annotations

import json
from pathlib import Path

from restore_agent.programs.parts import PARTS
from zerowake_shared.bundle import gathered
from zerowake_shared.checkup import Subject


async def test_manifests_and_criu_s_log(state: Path) -> None:
    (state / "criu.log").write_text("dump: Error (x.c:1)\n")
    found, missing = await gathered(PARTS, Subject(state, Path("/nowhere")))
    assert missing == []
    assert found.keys() == {"memory.json", "logs/criu.log", "snapshots/default-small.json"}
    manifest = json.loads(json.dumps(found["snapshots/default-small.json"]))
    assert (manifest["name"], manifest["canary"].keys()) == ("small", {"path"})
    assert len(manifest["digest"]) == 64
    signing = (state / "keys/signing.pem").read_text().splitlines()[1]
    assert signing not in json.dumps(found)


async def test_a_snapshot_that_cannot_be_read_says_why(state: Path) -> None:
    (manifest,) = (state / "snapshots").glob("*/manifest.json")
    manifest.write_text("{")
    found, _ = await gathered(PARTS, Subject(state, Path("/nowhere")))
    assert "unreadable" in json.dumps(found["snapshots/default-small.json"])


async def test_nothing_yet(tmp_path: Path) -> None:
    found, missing = await gathered(PARTS, Subject(tmp_path / "none", Path("/nowhere")))
    assert (found.keys(), missing) == ({"memory.json"}, [])
