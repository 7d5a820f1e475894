"""Snapshots of containers: a node that takes them, the request for one, and what is asked of the engines that come back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

from restore_agent.engine.engine import Engine
from restore_agent.sequences.capture import CaptureRequest
from restore_agent.sequences.node import Node
from restore_agent.service import metrics
from restore_agent.snapshots.manifest import EngineRecord
from tests.worlds.agent import PORT

IMAGE, ADDRESS = "sha256:0123", "10.1.2.3"


def nothing(phase: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def request(command: list[str]) -> CaptureRequest:
    record = EngineRecord(command=tuple(command), port=PORT, ready_timeout_seconds=60)
    return CaptureRequest("team", "small", "small", record, canary_path="/sum", replace=True)


@contextlib.asynccontextmanager
async def a_node(state: Path) -> AsyncIterator[Node]:
    async with Node.open("test", state / "state", state / "memory", state / "gpumem.sock", metrics) as node:
        assert node.criu
        yield node


async def answer_of(engine: Engine, path: str = "/sum") -> object:
    async with engine.session() as session:
        return json.loads((await engine.ask(session, path)).body)


def rights(pid: int) -> set[str]:
    """Of every thread."""
    kept = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp:")
    lines = [line for status in Path(f"/proc/{pid}/task").glob("*/status") for line in status.read_text().splitlines()]
    return {line for line in lines if line.startswith(kept)}
