"""`zerowake snapshot …` as a user types it, beside an agent that runs and without one."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import yaml

from restore_agent.snapshots.catalog import Catalog
from restore_agent.snapshots.keyring import Keyring
from tests.worlds.agent import ENGINE, Agent, engine
from tests.worlds.command import zerowake


async def test_looking_at_snapshots_needs_no_agent(state: Path) -> None:
    assert "small" in await zerowake("snapshot", "list", "--state", str(state))
    (listed,) = yaml.safe_load(await zerowake("snapshot", "list", "-o", "yaml", "--state", str(state)))
    manifest = Catalog(state).get("default", "small").manifest
    assert (listed["name"], listed["unusable"], listed["page_bytes"]) == ("small", None, manifest.page_bytes)
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
    (listed,) = json.loads(await zerowake("snapshot", "list", "-o", "json", "--state", str(state)))
    assert listed["name"] == "small" and "manifest" in listed["unusable"]


async def test_a_snapshot_is_signed_by_another_key_after_its_own_was_revoked(agent: Agent, mapped: Path) -> None:
    """While the agent runs: it refuses at once what is revoked, and restores what is signed again."""
    state = ("--state", str(agent.state))
    old = Keyring(agent.state / "keys").signing
    assert f"signed by key {old}" in await zerowake("snapshot", "verify", *state, "small")
    assert f"key {old}, which signed before, stays trusted" in await zerowake("key", "make", *state)
    await zerowake("key", "revoke", *state, old)
    refused = await zerowake("snapshot", "verify", *state, "small", code=1)
    assert f"it is signed by key {old}, which was revoked; take the snapshot again" in refused
    assert (await agent.restore("small", cold=engine(mapped))).fallback_reason == "untrusted"
    new = Keyring(agent.state / "keys").signing
    assert f"signed by key {new}" in await zerowake("snapshot", "sign", *state, "small")
    assert f"signed by key {new}" in await zerowake("snapshot", "verify", *state, "small")
    assert (await agent.restore("small")).fallback_reason == ""


async def test_a_node_without_a_signing_key_says_so_before_it_starts_anything(state: Path, tmp_path: Path) -> None:
    own = Keyring(state / "keys")
    fleet = Keyring(tmp_path / "fleet")
    public = own.public_file(own.signing)
    assert public is not None
    fleet.trust(public.read_bytes())
    there = ("--state", str(state), "--keys", str(fleet.folder))
    assert "are whole" in await zerowake("snapshot", "verify", *there, "small")
    touch = ("--port", "8000", "--", "touch", str(tmp_path / "started"))
    refused = await zerowake("snapshot", "create", *there, "other", *touch, code=1)
    assert f"{fleet.folder} has no signing.pem, so this node only restores; take snapshots on one that has it" in refused
    assert not (tmp_path / "started").exists()
    nobody = ("--state", str(state), "--keys", str(tmp_path / "nobody"))
    assert "holds no key, so no snapshot would count" in await zerowake("snapshot", "create", *nobody, "other", *touch, code=1)
    assert "not trusted here" in await zerowake("snapshot", "verify", *nobody, "small", code=1)


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


async def test_a_snapshot_that_is_taken_into_a_store_at_once(state: Path, mapped: Path, tmp_path: Path) -> None:
    """If that fails it stays on the node, and is pushed by the command that the error names."""
    server = ["--port", "8000", "--canary", "/sum", "--", sys.executable, str(ENGINE), "8000", "4", str(mapped)]
    create = ("snapshot", "create", "--state", str(state))
    (tmp_path / "here").mkdir()
    said = await zerowake(*create, "stored", "--to", f"file://{tmp_path}/here", *server)
    assert re.search(rf"proved\n(note: .*\n)*snapshot default/stored@\w{{12}} is in file://{tmp_path}/here: ", said)
    away = f"file://{tmp_path}/not/there"
    said = await zerowake(*create, "kept", "--to", away, *server, code=1)
    assert "\x1b" not in said and "\r" not in said
    again = re.search(r"default/kept@\w{12} stays on this node and is not in .*; `(zerowake .*)` pushes it again", said)
    assert again and "are whole" in await zerowake("snapshot", "verify", "--state", str(state), "kept")
    (tmp_path / "not/there").mkdir(parents=True)
    assert f"is in {away}: " in await zerowake(*again[1].split()[1:])
    assert "is no URL of a store" in await zerowake(*create, "never", "--to", "models", *server, code=1)
    assert "no snapshot default/never" in await zerowake("snapshot", "show", "--state", str(state), "never", code=1)
