"""What servers do that snapshots trip over, each in a small threaded server: it is carried, or refused at `create` with the way out."""

from __future__ import annotations

import asyncio
import platform
import re
import sys

import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog, NotFound
from tests.worlds.agent import Agent, get
from tests.worlds.device import ROOT
from tests.worlds.served import snapshot, three_at_once

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="some calls are made by their numbers of x86_64")


def engine(*traits: str) -> list[str]:
    return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.worlds.odd_engine", "8000", *traits]


@pytest.mark.parametrize(
    ("trait", "words"),
    [
        ("daemon", r"pid 1\d\d\d \(.*the helper\); have it stay in the foreground"),
        ("packets", r"^zerowake: the engine has a pipe in packet mode \(O_DIRECT\); have it use .*its log: /\S*/criu\.log$"),
    ],
)
async def test_what_cannot_be_carried_is_refused_in_one_line_with_the_way_out(agent: Agent, trait: str, words: str) -> None:
    told = await snapshot(agent, trait, engine(trait), health="/health", canary="/look", code=1)
    (line,) = [line for line in told.splitlines() if line.strip()]
    assert re.search(words, line), told
    with pytest.raises(NotFound):
        Catalog(agent.state).get("default", trait)


async def test_what_can_be_carried_is_the_same_in_three_replicas_at_once(agent: Agent) -> None:
    traits = {
        "child": True,
        "ended-child": True,
        "multipath": "here",
        "periodic-timer": [True] * 3,
        "absolute-periodic-timer": [True] * 3,
        "timer-at-a-moment": 0,
        "stopped-timer": 0,
        "signal-timer": [True] * 3,
    }
    await snapshot(agent, "odd", engine(*traits), health="/health", canary="/look")
    await three_at_once(agent, "odd", "/look", traits, processes=2)


async def test_no_engine_sees_the_time_that_its_standby_slept(agent: Agent) -> None:
    """Neither that of a replica that was put to sleep nor that of one restored ahead; one that slept for a moment only is woken."""
    await snapshot(agent, "watched", engine("watchdog"), health="/health", canary="/look")
    first = (await agent.restore("watched")).replica
    assert await agent.demote(first) == ""
    await asyncio.sleep(4)  # it sleeps
    second = (await agent.restore("watched")).replica
    assert get(second, "/look") == {"watchdog": True}
    await agent.release(second)
    await agent.stage("watched", pb.RUNG_STANDBY)
    await asyncio.sleep(4)
    third = (await agent.restore("watched")).replica
    assert get(third, "/look") == {"watchdog": True}
    assert await agent.demote(third) == ""
    assert (await agent.restore("watched")).replica.origin == pb.ORIGIN_STANDBY
