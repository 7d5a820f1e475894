"""The gateway's tests run on both event loops: uvloop's transports and descriptors are not asyncio's. Tests of times have a virtual one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from tests.worlds.controlled import World, controlled
from tests.worlds.virtual_time import VirtualTimeLoop

_VIRTUAL = {"test_autoscaler", "test_cron", "test_surge", "test_watch", "test_workqueue"}
_ON_BOTH = {
    "test_body",
    "test_client_connection",
    "test_client_gone",
    "test_connection",
    "test_dispatcher",
    "test_exchange",
    "test_gateway",
    "test_openai_client",
    "test_reply",
    "test_upgrade",
    "test_upstream",
}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.stem in _VIRTUAL:
        return {"virtual": VirtualTimeLoop}
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.stem in _ON_BOTH:
        loops["uvloop"] = uvloop.new_event_loop
    return loops


@pytest.fixture
async def without_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """The controller, in a cluster that has no agent."""
    async with controlled(tmp_path, monkeypatch) as world:
        yield world


@pytest.fixture
async def world(without_agents: World) -> World:
    """The controller, in a cluster with one agent."""
    await without_agents.node("n0")
    return without_agents
