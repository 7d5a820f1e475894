"""`zerowake snapshot …` as a user types it, beside an agent that runs and without one."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.worlds.agent import ENGINE, Agent
from tests.worlds.command import zerowake


async def test_looking_at_snapshots_needs_no_agent(state: Path) -> None:
    assert "small" in await zerowake("snapshot", "list", "--state", str(state))
    assert json.loads(await zerowake("snapshot", "show", "--state", str(state), "small"))["name"] == "small"
    assert "are whole" in await zerowake("snapshot", "verify", "--state", str(state), "small")
    missing = await zerowake("snapshot", "show", "--state", str(state), "other", code=1)
    assert "no snapshot default/other on this node; `zerowake snapshot create` makes one" in missing
    assert "is not allowed" in await zerowake("snapshot", "show", "--state", str(state), "../../etc", code=1)


async def test_a_spoiled_snapshot_is_listed_with_its_fault(state: Path) -> None:
    chunk = max((state / "chunks").glob("*/*"), key=lambda path: path.stat().st_size)
    chunk.write_bytes(b"x" * chunk.stat().st_size)
    assert chunk.name in await zerowake("snapshot", "verify", "--state", str(state), "small", code=1)
    (manifest,) = (state / "snapshots").glob("*/manifest.json")
    manifest.write_text(manifest.read_text() + " ")
    assert "unusable" in await zerowake("snapshot", "list", "--state", str(state))


async def test_removing_without_an_agent(state: Path) -> None:
    await zerowake("snapshot", "rm", "--state", str(state), "small")
    assert list((state / "chunks").glob("*/*")) == []
    assert "no snapshot default/small" in await zerowake("snapshot", "rm", "--state", str(state), "small", code=1)


async def test_creating_beside_an_agent(agent: Agent, mapped: Path) -> None:
    """The agent that owns the folder takes it, and serves the source on if asked."""
    server = [sys.executable, str(ENGINE), "8000", "4", str(mapped)]
    said = await zerowake(
        "snapshot", "create", "--state", str(agent.state), "second", "--port", "8000", "--canary", "/sum", "--keep-serving", "--", *server
    )
    assert "proved" in said
    assert "second" in await zerowake("snapshot", "list", "--state", str(agent.state))
    again = await zerowake(
        "snapshot", "create", "--state", str(agent.state), "second", "--port", "8000", "--canary", "/sum", "--", *server, code=1
    )
    assert "default/second exists already; choose another name, --replace it" in again
    assert (await agent.restore("second")).fallback_reason == ""


async def test_an_engine_that_answers_nothing_real(state: Path, mapped: Path) -> None:
    """It knows none of the usual requests: the error says how to name one."""
    server = [sys.executable, str(ENGINE), "8000", "4", str(mapped)]
    assert "--canary" in await zerowake("snapshot", "create", "--state", str(state), "unasked", "--port", "8000", "--", *server, code=1)


async def test_every_line_of_the_agents_log_is_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scaler.programs.cli", "agent", "--state", str(tmp_path / "state"), "--node", 'a "node"']
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    async with asyncio.timeout(20):
        while "serves on" not in (line := json.loads(await process.stderr.readline()))["message"]:
            pass
    assert line["message"].startswith('agent of node a "node" serves on') and line["level"] == "info"
    process.terminate()
    for line in (await process.stderr.read()).splitlines():
        json.loads(line)
    assert await process.wait() == 0
