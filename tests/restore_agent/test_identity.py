"""Replicas of one snapshot have the same memory: what they draw at random must differ all the same, and each hears how long it was away."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import Agent, get, running
from tests.worlds.device import ROOT
from tests.worlds.renewing import drawing_server
from tests.worlds.served import snapshot

ENGINE = ROOT / "tests/worlds/drawing_engine.py"
REPEATED = {"random", "numpy", "openssl", "cryptography"}  # what a program keeps itself

DRAWN_IN_C = {"rand", "random", "drand48", "lrand48", "mrand48"}


def engine(*options: str) -> list[str]:
    return [sys.executable, str(ENGINE), "8000", *options]


@pytest.fixture
async def agent(needs_criu: None, tmp_path: Path) -> AsyncIterator[Agent]:
    async with running(tmp_path / "state") as started:
        yield started


async def two(agent: Agent, name: str) -> tuple[pb.Replica, pb.Replica]:
    responses = await asyncio.gather(agent.restore(name), agent.restore(name))
    assert [response.fallback_reason for response in responses] == ["", ""]
    return responses[0].replica, responses[1].replica


def same(first: pb.Replica, second: pb.Replica) -> set[str]:
    """What both draw alike."""
    drawn: list[Any] = [get(replica, "/draw") for replica in (first, second)]
    return {name for name in drawn[0] if drawn[0][name] == drawn[1][name]}


async def test_replicas_of_a_program_that_knows_nothing_of_it(agent: Agent) -> None:
    """As it is they draw the same, which `create` says and what to do; with --renew they do not, and it says nothing."""
    told = await snapshot(agent, "plain", engine(), canary="/health")
    assert "note: each replica starts with the same random state: Python's random of pid" in told
    assert "OpenSSL of pid" in told and "--renew" in told
    assert same(*await two(agent, "plain")) == REPEATED

    told = await snapshot(agent, "renewed", engine(), "--renew", canary="/health")
    assert "random state" not in told
    assert same(*await two(agent, "renewed")) == set()


async def test_replicas_of_a_program_that_draws_by_the_c_library(agent: Agent, tmp_path: Path) -> None:
    """Of which `create` cannot know: nothing shows from outside who calls that, and for what."""
    program = str(drawing_server(tmp_path))
    for name, seed, options, are_alike in (
        ("plain", [], [], True),
        ("seeded", ["7"], ["--renew"], False),
        ("renewed", [], ["--renew"], False),
        ("kept", ["7"], ["--renew", "--env", "ZEROWAKE_KEEP_SEEDS=1"], True),
    ):
        told = await snapshot(agent, name, [program, "8000", *seed], *options, canary="/health")
        assert "random state" not in told
        assert same(*await two(agent, name)) == (DRAWN_IN_C if are_alike else set()), name


async def test_an_engine_that_is_told_draws_anew_and_hears_how_long_it_was_away(agent: Agent) -> None:
    told = await snapshot(agent, "told", engine("--told"), "--env", f"PYTHONPATH={ROOT}", canary="/health")
    assert "random state" not in told
    replicas = await two(agent, "told")
    assert same(*replicas) == set()
    away = time.time() - Catalog(agent.state).get("default", "told").manifest.dumped_at
    said: list[Any] = [get(replica, "/back") for replica in replicas]
    for each in said:
        assert (each["version"], each["restored"], each["mode"], each["owner"]) == (1, True, "0o600", 0)
        assert away - 10 < each["away_seconds"] < away
    assert len({each["entropy"] for each in said}) == 2 and all(len(each["entropy"]) == 64 for each in said)

    # As a standby it sleeps as itself.
    before = get(replicas[0], "/draw")
    assert await agent.demote(replicas[0]) == ""
    asleep = time.time()
    woken = await agent.restore("told")
    assert woken.replica.origin == pb.ORIGIN_STANDBY
    back: Any = get(woken.replica, "/back")
    assert back["restored"] is False and 0 <= back["away_seconds"] < time.time() - asleep + 10
    assert back["entropy"] != said[0]["entropy"] and get(woken.replica, "/draw") != before


async def test_seeds_that_shall_stay_do(agent: Agent) -> None:
    await snapshot(agent, "seeded", engine("7"), "--renew", "--env", "ZEROWAKE_KEEP_SEEDS=1", canary="/health")
    assert same(*await two(agent, "seeded")) == {"random", "numpy"}, "OpenSSL has no seed that anybody would choose"
