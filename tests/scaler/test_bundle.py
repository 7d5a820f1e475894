"""`zerowake bundle` beside a running `zerowake up`, with secrets planted wherever somebody may put one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from scaler.view.state import socket_of
from tests.worlds.ports import free_port
from tests.worlds.waiting import until

S = "Planted-s3cret-"  # each place has its own, so that a leak says where from


@asynccontextmanager
async def up(file: Path, log: Path) -> AsyncIterator[None]:
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "scaler.programs.cli", "up", str(file), stderr=errors)
    state = file.parent / "state"
    try:
        await until(lambda: (state / "agent.sock").exists() and socket_of(state).exists())
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def bundle(folder: Path, *arguments: str, **environment: str) -> tuple[str, dict[str, str]]:
    """What it printed, and its files."""
    command = [sys.executable, "-m", "scaler.programs.cli", "bundle", "--machine", "--to", str(folder / "b.tar.gz"), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=os.environ | environment
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    with tarfile.open(folder / "b.tar.gz") as archive:
        files = {name.removeprefix("b/"): archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    return out.decode(), files


async def test_a_bug_report_holds_what_helps_and_no_secret(tmp_path: Path) -> None:
    metrics, state = free_port(), tmp_path / "state"
    (tmp_path / "token").write_text(f"{S}token-file\n")
    model: dict[str, Any] = {
        "command": [sys.executable, "-m", "http.server", "8000", "--api-key", f"{S}argument", f"--auth-token={S}joined"],
        "port": 8000,
        "env": {"HF_TOKEN": f"{S}token", "ANYTHING": f"{S}variable"},
        "sources": [{"type": "push"}],
    }
    file = tmp_path / "zerowake.yaml"
    config = {"state": "state", "listen": "127.0.0.1:0", "metrics": f"127.0.0.1:{metrics}", "push": {"token_file": "token"}}
    file.write_text(yaml.safe_dump({**config, "models": {"m": model}}))
    log = tmp_path / "up.log"
    async with up(file, log):
        with log.open("a") as said:
            said.write(f"INFO: Authorization: Bearer {S}header\n")
            said.write(json.dumps({"message": f"engine has {S}variable and {S}token-file", "password": f"{S}member"}) + "\n")
        (state / "criu.log").write_text(f"dump: env AWS_SESSION_TOKEN={S}criu\n")
        printed, files = await bundle(tmp_path, str(file), AWS_SECRET_ACCESS_KEY=f"{S}own")
    assert {"versions.json", "doctor.json", "zerowake.yaml.json", "status.json", "plan.json", "metrics/scaler.txt"} <= files.keys()
    assert {"logs/up.log", "logs/criu.log", "memory.json"} <= files.keys()
    for name, text in files.items():
        assert S not in text, (name, text[max(0, text.index(S) - 100) : text.index(S) + 50])
        if name.endswith(".json"):
            json.loads(text)
        assert name in printed
    signing = (state / "keys/signing.pem").read_text().splitlines()[1]
    assert signing not in "".join(files.values())
    assert "HF_TOKEN" in files["zerowake.yaml.json"], "names stay"
    assert "zerowake_" in files["metrics/scaler.txt"]
    assert '"name": "m"' in files["status.json"]
    assert f"written to {tmp_path / 'b.tar.gz'}" in printed
    assert (tmp_path / "b.tar.gz").stat().st_mode & 0o777 == 0o600


async def test_where_nothing_runs_there_is_a_report_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text(f"models: [{S}broken")
    printed, files = await bundle(tmp_path, str(file), "--state", str(tmp_path / "state"))
    assert {"doctor.json", "versions.json", "missing.json"} <= files.keys()
    assert "is no YAML" in files["missing.json"]
    assert S not in "".join(files.values()) + printed
    assert not (tmp_path / "state").exists()
    file.write_text(yaml.safe_dump({"store": f"s3://user:{S}url@bucket", "models": {"m": {"snapshot": "m", "env": {"A": f"{S}variable"}}}}))
    (tmp_path / "b.tar.gz").unlink()
    _, files = await bundle(tmp_path, str(file), "--state", str(tmp_path / "state"))
    assert '"store": "s3://(left out)@bucket"' in files["zerowake.yaml.json"]
    assert S not in "".join(files.values())
