"""Another version's halves beside this one's, with root: `python -m tests.upgrade COMMIT…`.

It builds wheels of those commits and of this tree. For each commit, both versions take a snapshot into one state folder, and then
`zerowake up` serves both snapshots from zero with each pair of a scaler and an agent, from the old ones to the new ones and back. Every
answer has to be the engine's; whether its replica was restored, and if not why, is printed. The programs are the wheels' own: only the
agent that a scaler starts is the other version's, where that is asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.worlds.ports import free_port

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).parent / "worlds" / "hashing_engine.py"
PORT = 8000
_START = "import sys; sys.executable = sys.argv.pop(1); from scaler.programs.cli import main; main()"
_PATIENCE = 120.0


@dataclass(frozen=True)
class Version:
    """What is installed of one: the folder of a wheel."""

    name: str
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def built(name: str, tree: Path, folder: Path) -> Version:
    wheels, into = folder / f"wheel-{name}", folder / f"version-{name}"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "build", "--wheel", "--quiet", "--python", sys.executable, "--out-dir", wheels, tree], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, into], check=True)
    for program in (into / "zerowake_native").iterdir():
        program.chmod(0o755)
    return Version(name, into)


def of_commit(commit: str, folder: Path) -> Version:
    name = subprocess.run(["git", "rev-parse", "--short", commit], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    tree = folder / f"tree-{name}"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    return built(name, tree, folder)


class Machine:
    """One state folder, and who serves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        (folder / "weights.bin").write_bytes(os.urandom(1 << 20))
        self.command = [sys.executable, str(SERVER), str(PORT), "8", str(folder / "weights.bin")]

    def capture(self, version: Version, name: str) -> str:
        """Returns why it could not be taken; empty: it was."""
        words = ["snapshot", "create", name, "--state", str(self.state), "--port", str(PORT), "--canary", "/sum", "--", *self.command]
        command = [sys.executable, "-m", "scaler.programs.cli", *words]
        ran = subprocess.run(command, env=version.env, cwd=self.folder, capture_output=True, text=True, check=False)
        return "" if ran.returncode == 0 else (ran.stderr or ran.stdout).strip()[-500:]

    @asynccontextmanager
    async def up(self, scaler: Version, agent: Version, models: list[str]) -> AsyncIterator[str]:
        """Yields the gateway's URL."""
        port, file, python = free_port(), self.folder / "up.yaml", self.folder / "python"
        python.write_text(f'#!/bin/sh\ncase " $* " in *" agent "*) export PYTHONPATH={agent.folder};; esac\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        section = {"command": self.command, "port": PORT, "canary": "/sum", "cooldown_seconds": 0.2, "polling_seconds": 0.2}
        told = {"state": str(self.state), "listen": f"127.0.0.1:{port}", "models": {name: {"snapshot": name} | section for name in models}}
        file.write_text(yaml.safe_dump(told))
        with (self.folder / "up.log").open("ab") as log:
            command = [sys.executable, "-c", _START, str(python), "up", str(file)]
            process = await asyncio.create_subprocess_exec(*command, env=scaler.env, cwd=self.folder, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()

    async def status(self) -> Any:
        connector = aiohttp.UnixConnector(str(self.state / "status.sock"))
        async with aiohttp.ClientSession(connector=connector) as http, http.get("http://zerowake/") as response:
            return await response.json()

    async def until(self, holds: Any, what: str) -> Any:
        deadline = time.monotonic() + _PATIENCE
        found: Any = None
        while time.monotonic() < deadline:
            with suppress(aiohttp.ClientError, OSError):
                if holds(found := await self.status()):
                    return found
            await asyncio.sleep(0.1)
        raise AssertionError(f"{what}: not so within {_PATIENCE:g} s: {json.dumps(found)[:2000]}")


async def served(machine: Machine, scaler: Version, agent: Version, models: list[str]) -> list[str]:
    """A line for each model."""
    lines = []
    async with machine.up(scaler, agent, models) as url, aiohttp.ClientSession() as http:
        found = await machine.until(
            lambda status: all(model["rung"] == "memory" or model["unusable"] for model in status["models"]), "snapshots are staged"
        )
        unusable = {model["name"]: model["unusable"] for model in found["models"]}
        for name in models:
            async with http.get(f"{url}/models/{name}/sum") as response:
                text = await response.text()
            said = json.loads(text).get("digest", "") if response.status == 200 else ""
            assert len(said) == 64, f"{name} answers {response.status}: {text[:500]}"
            status = await machine.until(lambda status, name=name: name in [each["model"] for each in status["replicas"]], "it is told of")
            (replica,) = [each for each in status["replicas"] if each["model"] == name]
            why = f": {replica['detail'] or unusable[name]}" if replica["origin"] != "restored" else ""
            lines.append(f"{name:12} answered by a replica {replica['origin']}{why}")
        await machine.until(lambda status: not status["replicas"], "back at zero")
    return lines


async def beside(old: Version, new: Version, folder: Path) -> None:
    machine = Machine(folder)
    snapshots = []
    for version, name in ((old, "of-old"), (new, "of-new")):
        why = machine.capture(version, name)
        print(f"{name}: {why or 'taken'} by {version.name}", flush=True)
        assert not why
        snapshots.append(name)
    for scaler, agent in ((old, old), (new, old), (new, new), (old, new), (old, old), (new, new)):
        lines = await served(machine, scaler, agent, snapshots)
        print(f"scaler {scaler.name:8} agent {agent.name:8} " + "\n                                  ".join(lines), flush=True)


def main() -> int:
    if os.geteuid() != 0 or not sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="zerowake-upgrade-", dir="/var/tmp") as folder:
        new = built("new", ROOT, Path(folder))
        for number, commit in enumerate(sys.argv[1:]):
            old = of_commit(commit, Path(folder))
            work = Path(folder) / str(number)
            work.mkdir()
            try:
                asyncio.run(beside(old, new, work))
            except BaseException:
                print((work / "up.log").read_text()[-4000:] if (work / "up.log").exists() else "")
                raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
