"""One agent for all servers of a file, and three replicas of each at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.worlds.agent import Agent, running
from tests.worlds.leftovers import left_behind
from tests.worlds.needs import missing_for_criu


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    """Afterwards nothing of it may be left."""
    if missing := missing_for_criu():
        pytest.skip(missing)
    state = tmp_path / "state"
    async with running(state) as started:
        yield started
    assert left_behind(state) == []
