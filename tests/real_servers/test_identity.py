"""What servers draw at random differs in the replicas of one snapshot, with --renew; as they are it does not, which `create` says."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worlds.agent import Agent, get
from tests.worlds.served import snapshot

SERVERS = Path(__file__).parent.parent / "worlds/servers"
DRAWN = {"random", "uuid", "webUUID", "bytes", "int", "values"}


async def repeated(agent: Agent, name: str) -> dict[str, set[str]]:
    """What two replicas draw alike, in each thread. They are released again."""
    responses = await asyncio.gather(agent.restore(name), agent.restore(name))
    try:
        assert [response.fallback_reason for response in responses] == ["", ""]
        first, second = (get(response.replica, "/draw") for response in responses)
    finally:
        await asyncio.gather(*(agent.release(response.replica) for response in responses))
    return same(first, second)


def same(first: Any, second: Any) -> dict[str, set[str]]:
    return {thread: {name for name in first[thread] if first[thread][name] == second[thread][name]} for thread in first}


@pytest.fixture
def node() -> list[str]:
    if (program := shutil.which("node")) is None:
        pytest.skip("needs node: `make servers` installs it")
    return [program, str(SERVERS / "drawing.js"), "8000"]


async def test_node_in_its_threads(agent: Agent, node: list[str]) -> None:
    told = await snapshot(agent, "plain", node, canary="/health")
    assert "the same random state: Node's Math.random and crypto of pid" in told and "OpenSSL of pid" in told
    found = await repeated(agent, "plain")
    assert found["main"] == DRAWN, "this is what is to be mended"

    told = await snapshot(agent, "renewed", node, "--renew", canary="/health")
    assert "random state" not in told
    assert await repeated(agent, "renewed") == {"main": set(), "worker": set()}
