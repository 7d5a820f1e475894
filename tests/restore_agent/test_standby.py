"""Standbys: made ahead, woken by the next restore, made of idle replicas, dropped in every way that a node knows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.places.processes import cpu_seconds
from tests.worlds.agent import Agent, engine, get, running
from tests.worlds.leftovers import nothing_left
from tests.worlds.processes import below


def engines(agent: Agent) -> list[int]:
    """Host pids of the servers (not their sandboxes' init) that live under this agent."""
    return sorted(pid for _, pid, words in below(agent.process.pid) if "hashing_engine.py" in words and "sandbox-init" not in words)


async def test_a_standby_is_woken_by_the_next_restore(agent: Agent) -> None:
    answer = await agent.stage("small", pb.RUNG_STANDBY)
    assert answer.residency.rung == pb.RUNG_STANDBY
    before = engines(agent)
    assert before, "its processes are there"
    assert await agent.live_replicas() == set(), "and it is nobody's replica"
    used = cpu_seconds(before)
    await asyncio.sleep(0.3)  # time in which a running one would have used some
    assert cpu_seconds(before) == used
    restored = await agent.restore("small")
    assert restored.fallback_detail == ""
    assert restored.replica.origin == pb.ORIGIN_STANDBY
    assert engines(agent) == before
    assert get(restored.replica, "/sum") == agent.recorded_answer()
    assert "image.fill" not in [phase.name for phase in restored.replica.phases]
    assert await agent.rung("small") == pb.RUNG_MEMORY
    second = await agent.restore("small")
    assert second.replica.origin == pb.ORIGIN_RESTORED
    assert get(second.replica, "/sum") == agent.recorded_answer()


async def test_staging_twice_makes_one(agent: Agent) -> None:
    await asyncio.gather(*(agent.stage("small", pb.RUNG_STANDBY) for _ in range(3)))
    one = engines(agent)
    await agent.stage("small", pb.RUNG_STANDBY)
    assert engines(agent) == one
    answers = await asyncio.gather(*(agent.restore("small") for _ in range(3)))
    origins = sorted(answer.replica.origin for answer in answers)
    assert origins == [pb.ORIGIN_RESTORED, pb.ORIGIN_RESTORED, pb.ORIGIN_STANDBY], "and only one of three restores gets it"
    assert len({str(get(answer.replica, "/sum")) for answer in answers}) == 1


async def test_an_idle_replica_becomes_a_standby_and_the_same_replica_again(agent: Agent) -> None:
    replica = (await agent.restore("small")).replica
    count = get(replica, "/count")["count"]
    processes = engines(agent)
    assert await agent.demote(replica) == ""
    assert await agent.rung("small") == pb.RUNG_STANDBY
    assert await agent.live_replicas() == set()
    for pid in processes:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T", "stopped"
    woken = (await agent.restore("small")).replica
    assert woken.origin == pb.ORIGIN_STANDBY
    assert woken.id != replica.id
    assert get(woken, "/count")["count"] == count + 1, "the process that was demoted"
    assert get(woken, "/sum") == agent.recorded_answer()
    await agent.release(woken)
    assert engines(agent) == []


async def test_a_second_idle_replica_is_released(agent: Agent) -> None:
    one, two = (await agent.restore("small")).replica, (await agent.restore("small")).replica
    assert await agent.demote(one) == ""
    kept = set(engines(agent))
    assert "has a standby" in await agent.demote(two)
    assert set(engines(agent)) < kept
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await agent.demote(two)
    assert gone.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_replica_without_a_snapshot_is_released(agent: Agent, mapped: Path) -> None:
    cold = await agent.stub.Restore(pb.RestoreRequest(request_id="cold", model="plain", cold=engine(mapped)))
    assert "without a snapshot" in await agent.demote(cold.replica)
    assert engines(agent) == []


async def test_an_engine_that_is_told_of_nothing_cannot_be_parked_and_stays_where_it_stands(agent: Agent) -> None:
    replica = (await agent.restore("small")).replica
    await agent.stage("small")
    for refused in (agent.demote(replica, pb.RUNG_PARKED), agent.stage("small", pb.RUNG_PARKED)):
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be parked: it does not take part in the control directory") as said:
            await refused
        assert said.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert ("zerowake-reason", "cannot-park") in list(said.value.trailing_metadata() or ())
    assert await agent.rung("small") == pb.RUNG_MEMORY
    assert get(replica, "/sum") == agent.recorded_answer(), "the replica serves on"
    await agent.stage("small", pb.RUNG_STANDBY)
    with pytest.raises(grpc.aio.AioRpcError, match="cannot be parked"):
        await agent.stage("small", pb.RUNG_PARKED)
    assert (await agent.unstage("small", pb.RUNG_STANDBY)).residency.rung == pb.RUNG_STANDBY


async def test_a_standby_of_a_removed_snapshot_goes_with_it(agent: Agent) -> None:
    replica = (await agent.restore("small")).replica
    await agent.stage("small", pb.RUNG_STANDBY)
    await agent.unstage("small", pb.RUNG_ABSENT)
    assert "no snapshot" in await agent.demote(replica), "and a replica of it becomes none"
    assert engines(agent) == []


async def test_a_standby_expires(agent: Agent) -> None:
    watching = asyncio.create_task(agent.until_rung("small", pb.RUNG_STANDBY))
    await agent.stage("small", pb.RUNG_STANDBY, keep_seconds=0.3)
    await watching
    await agent.until_rung("small", pb.RUNG_MEMORY)
    async with asyncio.timeout(5):
        while engines(agent):
            await asyncio.sleep(0.02)  # the kernel is taking the pid namespace down


async def test_a_dropped_standby_leaves_nothing(agent: Agent) -> None:
    await agent.stage("small", pb.RUNG_STANDBY)
    assert (await agent.unstage("small", pb.RUNG_MEMORY)).residency.rung == pb.RUNG_MEMORY
    assert engines(agent) == []
    assert (await agent.restore("small")).replica.origin == pb.ORIGIN_RESTORED


@pytest.mark.parametrize("made", ["restored", "demoted"])
async def test_a_killed_standby_is_not_offered(agent: Agent, made: str) -> None:
    if made == "restored":
        await agent.stage("small", pb.RUNG_STANDBY)
    else:
        assert await agent.demote((await agent.restore("small")).replica) == ""
    for pid in engines(agent):
        with contextlib.suppress(ProcessLookupError):  # the first of them may take the others with it
            os.kill(pid, signal.SIGKILL)
    await agent.until_rung("small", pb.RUNG_MEMORY)
    answer = await agent.restore("small")
    assert answer.replica.origin == pb.ORIGIN_RESTORED
    assert get(answer.replica, "/sum") == agent.recorded_answer()


async def test_a_caller_that_leaves_leaves_no_standby(agent: Agent) -> None:
    await agent.stage("small")
    for delay in (0.0, 0.01, 0.02, 0.04, 0.08):
        call = asyncio.create_task(agent.stage("small", pb.RUNG_STANDBY))
        await asyncio.wait([call], timeout=delay)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await agent.stage("small", pb.RUNG_STANDBY)
    one = engines(agent)
    await agent.unstage("small", pb.RUNG_MEMORY)
    assert engines(agent) == [], f"no other lived beside {one}"


@pytest.mark.parametrize("made", ["restored", "demoted"])
async def test_a_killed_agent_leaves_no_standby(state: Path, made: str) -> None:
    async with running(state) as agent:
        if made == "restored":
            await agent.stage("small", pb.RUNG_STANDBY)
        else:
            assert await agent.demote((await agent.restore("small")).replica) == ""
        pids = engines(agent)
        agent.kill()
        await agent.process.wait()
        await nothing_left(state)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
