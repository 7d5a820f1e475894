"""One agent for all servers of a file, and three replicas of each at once."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.drivers.criu import Criu, CriuError
from tests.worlds.agent import Agent, running
from tests.worlds.leftovers import left_behind


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    """Afterwards nothing of it may be left."""
    try:
        Criu.find()
    except CriuError as error:
        pytest.skip(f"needs CRIU: {error}")
    if os.geteuid() != 0:
        pytest.skip("needs root, for CRIU and namespaces")
    state = tmp_path / "state"
    async with running(state) as started:
        yield started
    assert left_behind(state) == []
