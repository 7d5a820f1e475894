"""What `zerowake bundle` takes of a machine's scaler: its file, what it shows of itself, its metrics, its log."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp

from scaler.kubernetes import cluster_parts
from scaler.local.config import BadConfig, load
from scaler.local.yaml_file import read_yaml
from scaler.view.state import socket_of
from zerowake_shared.address import Address
from zerowake_shared.bundle import MOST, Part, Parts, end_of
from zerowake_shared.checkup import Subject
from zerowake_shared.state_folder import OWNER_LOCK, STORE_LOCK

_SHOWN = {"status.json": "", "plan.json": "plan", "state.json": "state"}
_LINES = "5000"  # of the journal
_ANYWHERE = ("", "0.0.0.0", "::")


def versions(_: Subject) -> Parts:
    """Of what runs here."""
    packages = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    about = {"python": sys.version, "system": platform.platform(), "packages": dict(sorted(packages.items()))}
    return {"versions.json": {"zerowake": importlib.metadata.version("zerowake"), **about}}


def config(subject: Subject) -> Parts:
    """The file that was named. Raises BadFile: it is no YAML, so nobody knows what in it is secret, and it stays where it is."""
    return {"zerowake.yaml.json": read_yaml(subject.file)} if subject.file else {}


async def shown(subject: Subject) -> Parts:
    """What a running `zerowake up` answers on its socket; nothing where none runs."""
    path = socket_of(subject.state)
    if not path.exists():
        return {}
    found: dict[str, object] = {}
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), timeout=aiohttp.ClientTimeout(total=10)) as session:
        for name, what in _SHOWN.items():
            async with session.get(f"http://zerowake/{what}") as response:
                if response.status == 200:
                    found[name] = await response.json()
    return found


async def metrics(subject: Subject) -> Parts:
    """The pages of the scaler and the agent, as far as the file says where they are."""
    try:
        config = load(subject.file) if subject.file else None
    except BadConfig:
        config = None
    pages = {"scaler": config.metrics, "agent": config.agent_metrics} if config else {}
    found: dict[str, object] = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        for name, text in pages.items():
            if text and (address := Address.to_listen(text)).port:
                here = address._replace(host="127.0.0.1") if address.host in _ANYWHERE else address
                with contextlib.suppress(aiohttp.ClientConnectionError):  # nothing runs
                    async with session.get(f"http://{here}/metrics") as response:
                        found[f"metrics/{name}.txt"] = await response.text()
    return found


def logs(subject: Subject) -> Parts:
    """What the programs of this state folder have said last, where that goes into a file or the journal."""
    found: dict[str, object] = {}
    for name, lock in (("up", OWNER_LOCK), ("agent", STORE_LOCK)):
        with contextlib.suppress(OSError, ValueError):  # nothing runs, or it is another user's
            pid = int((subject.state / lock).read_text())
            file = Path(f"/proc/{pid}/fd/2")
            if stat.S_ISREG(file.stat().st_mode):
                found[f"logs/{name}.log"] = end_of(file)
            elif journalctl := shutil.which("journalctl"):
                found[f"logs/{name}.journal"] = _journal(journalctl, pid)
    return {name: text for name, text in found.items() if text}


def _journal(journalctl: str, pid: int) -> str:
    command = [journalctl, "--no-pager", "--quiet", "--output=cat", f"--lines={_LINES}", f"_PID={pid}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, errors="replace").stdout[-MOST:]


PARTS: Any = (
    Part("versions", versions),
    Part("zerowake.yaml", config),
    Part("what zerowake up shows", shown),
    Part("metrics", metrics),
    Part("logs", logs),
    *cluster_parts.PARTS,
)
