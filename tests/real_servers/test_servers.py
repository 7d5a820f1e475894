"""Servers that many models stand behind, with their defaults: snapshotted by the command line, restored three times at once, and asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds.agent import Agent
from tests.worlds.served import snapshot, three_at_once

SERVERS = Path(__file__).parent.parent / "worlds/servers"
ANSWER = {"answer": 42}


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: `make servers` installs it")
    return found


def go(folder: Path) -> list[str]:
    subprocess.run([program("go"), "build", "-o", folder / "server", SERVERS / "server.go"], check=True, cwd=folder)
    return [str(folder / "server"), "8000"]


def node(folder: Path) -> list[str]:
    return [program("node"), str(SERVERS / "server.js"), "8000"]


def node_cluster(folder: Path) -> list[str]:
    return [*node(folder), "2"]


def java(folder: Path) -> list[str]:
    subprocess.run([program("javac"), "-d", folder, SERVERS / "Server.java"], check=True)
    return [program("java"), "-cp", str(folder), "Server", "8000"]


def nginx(folder: Path) -> list[str]:
    return [program("nginx"), "-p", str(folder), "-c", str(SERVERS / "nginx.conf"), "-g", "daemon off;"]


def python(module: str, *arguments: str) -> list[str]:
    pytest.importorskip(module)
    return [sys.executable, "-m", module, *arguments]


def gunicorn(folder: Path) -> list[str]:
    """Its control socket lies below HOME, over which replicas have no layer where the machine's root is an overlay."""
    return ["env", "HOME=/tmp", *python("gunicorn", "-w", "2", "-b", "127.0.0.1:8000", "--chdir", str(SERVERS), "applications:wsgi")]


def uvicorn(folder: Path, workers: int = 1) -> list[str]:
    return python("uvicorn", "--port", "8000", "--workers", str(workers), "--app-dir", str(SERVERS), "applications:asgi")


@pytest.mark.parametrize(
    ("server", "processes"),
    [
        (go, 1),
        (node, 1),
        (node_cluster, 3),
        (java, 1),
        (nginx, 3),
        (gunicorn, 3),
        (uvicorn, 1),
        (lambda folder: uvicorn(folder, 2), 4),  # a parent, Python's resource tracker, two workers
    ],
    ids=["go", "node", "node-cluster", "java", "nginx", "gunicorn", "uvicorn", "uvicorn-2-workers"],
)
async def test_it_is_snapshotted_and_restored_three_times_at_once(agent: Agent, tmp_path: Path, server: object, processes: int) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    command = server(folder)  # type: ignore[operator]
    await snapshot(agent, "served", command, health="/health", canary="/answer")
    await three_at_once(agent, "served", "/answer", ANSWER, processes)
