"""Agents whose engines have their weights lent by gpumem: one snapshot of such an engine, and agents over copies of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from zerowake_proto import agent_pb2 as pb

from tests.worlds.agent import PORT, Agent, copy_state, running
from tests.worlds.device import ROOT
from tests.worlds.gpumem_server import Served
from tests.worlds.leftovers import left_behind, nothing_left
from tests.worlds.waiting import until


async def capture(state: Path, lender: Served, name: str, module: str, *words: str, **fields: object) -> None:
    """Of `python -m module PORT words…`, which is told where gpumem is. `fields`: more of the SnapshotRequest."""
    env = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH") if key in os.environ} | {"GPUMEM_SOCKET": str(lender.socket)}
    command = [sys.executable, "-m", module, str(PORT), *words]
    engine = pb.Engine(command=command, env=env, directory=str(ROOT), port=PORT, health_path="/health", ready_timeout_seconds=30)
    async with running(state, "--gpumem", str(lender.socket)) as agent:
        await agent.snapshot(name, engine, **fields)


@contextlib.asynccontextmanager
async def lending_agent(taken: Path, state: Path, lender: Served) -> AsyncIterator[Agent]:
    """Over a copy of the state folder `taken`; afterwards nothing of it is left, and nothing is lent."""
    async with running(copy_state(taken, state), "--gpumem", str(lender.socket)) as agent:
        yield agent
    await nothing_left(state)
    assert left_behind(state) == []
    await until(lambda: lent(lender) == 0)  # a killed one's connection closes as its process is taken down


def lent(lender: Served) -> int:
    """How many leases of it there are."""
    return sum(region.leases for region in lender.status().regions)
