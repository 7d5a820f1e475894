"""Parked engines: restored ahead or idle, woken, moved down, killed. Real ones, restored by CRIU, with threads and lent weights.

On this machine their weights are the host's memory, and they hold none of a GPU; what the GPU has to do with it is in tests/gpu/.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.places.place import CONTROL_DIRECTORY
from tests.worlds.agent import Agent, copy_state, get, running
from tests.worlds.checkpoints import SIZES, write_checkpoint
from tests.worlds.command import zerowake
from tests.worlds.gpumem_server import Served
from tests.worlds.leftovers import nothing_left
from tests.worlds.lending import capture, lending_agent, lent
from tests.worlds.processes import alive, below, stands_in_open
from tests.worlds.waiting import until

NAME = "quiet"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, lender: Served) -> Path:
    """A state folder with the snapshot of a server that takes part in the control directory, as an adapter does."""
    folder = tmp_path_factory.mktemp("quiet")
    write_checkpoint(folder / "weights", SIZES["small"])
    taking = capture(folder / "state", lender, NAME, "tests.worlds.faulty_engine", "small", weights=str(folder / "weights"))
    asyncio.run(taking)
    return folder / "state"


@pytest.fixture
async def agent(quiet: Path, lender: Served, tmp_path: Path) -> AsyncIterator[Agent]:
    async with lending_agent(quiet, tmp_path / "state", lender) as agent:
        yield agent


def engines(agent: Agent) -> list[int]:
    """Host pids of the servers that live under this agent."""
    return sorted(pid for _, pid, words in below(agent.process.pid) if "faulty_engine" in words and "sandbox-init" not in words)


def stopped(pids: list[int]) -> set[bool]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" for pid in pids}


def waiting(pids: list[int]) -> dict[int, str]:
    """The threads that stand at a door, each with what the scheduler has counted of it: its time, and how often it ran."""
    threads = ((pid, int(task.name)) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
    return {thread: Path(f"/proc/{pid}/task/{thread}/schedstat").read_text() for pid, thread in threads if stands_in_open(pid, thread)}


async def test_one_that_was_parked_ahead_is_woken_by_the_next_restore(agent: Agent, lender: Served) -> None:
    answer = await agent.stage(NAME, pb.RUNG_PARKED)
    assert answer.residency.rung == pb.RUNG_PARKED
    assert list(answer.residency.parked_bytes) == [], "no GPU is here"
    before = engines(agent)
    assert before and stopped(before) == {False}
    assert await agent.live_replicas() == set(), "it is nobody's replica"
    assert lent(lender) == 0
    woken = (await agent.restore(NAME)).replica
    assert woken.origin == pb.ORIGIN_PARKED
    assert engines(agent) == before
    assert get(woken, "/sum") == agent.recorded_answer(NAME)
    assert lent(lender) == 1
    assert {phase.name for phase in woken.phases} == {"weights", "unaccounted"}, "nothing of CRIU, nothing of CUDA"
    assert await agent.rung(NAME) == pb.RUNG_MEMORY


async def test_one_that_was_parked_ahead_has_its_own_random_state_before_anybody_asks(agent: Agent) -> None:
    """So that its wake need not make it; what it is made of is the same that the wake says, since ranks have to agree."""
    await agent.stage(NAME, pb.RUNG_PARKED)
    (pid,) = engines(agent)
    control = Path(f"/proc/{pid}/root", CONTROL_DIRECTORY.relative_to("/"))
    announced = list(control.glob("renews-*-python"))
    assert len(announced) == 1
    made = announced[0].stat().st_mtime_ns
    asked = json.loads((control / "renewal-requested").read_text())
    assert not (control / "restore-complete").exists()
    await agent.restore(NAME)
    woken = json.loads((control / "restore-complete").read_text())
    assert (woken["entropy"], woken["restored"]) == (asked["entropy"], True)
    assert announced[0].stat().st_mtime_ns == made, "once"


async def test_one_that_waits_costs_no_processor(agent: Agent) -> None:
    await agent.stage(NAME, pb.RUNG_PARKED)
    (before,) = waiting(engines(agent)).items()
    await asyncio.sleep(0.5)  # time in which one that polls would have run five hundred times
    assert waiting(engines(agent)) == dict([before]), "its thread has not run once"
    await agent.restore(NAME)


async def test_an_idle_replica_is_parked_and_the_same_again_as_often_as_it_is_idle(agent: Agent, lender: Served) -> None:
    replica = (await agent.restore(NAME)).replica
    before = engines(agent)
    for _ in range(4):
        assert await agent.demote(replica, pb.RUNG_PARKED) == ""
        assert await agent.rung(NAME) == pb.RUNG_PARKED
        assert (await agent.live_replicas(), lent(lender), stopped(before)) == (set(), 0, {False})
        woken = (await agent.restore(NAME)).replica
        assert (woken.origin, engines(agent)) == (pb.ORIGIN_PARKED, before)
        assert woken.id != replica.id
        assert get(woken, "/sum") == agent.recorded_answer(NAME)
        replica = woken
    await agent.release(replica)
    assert engines(agent) == []


@pytest.mark.parametrize("made", ["ahead", "idle"])
async def test_down_to_standby_and_up_again(agent: Agent, made: str) -> None:
    if made == "ahead":
        await agent.stage(NAME, pb.RUNG_PARKED)
    else:
        assert await agent.demote((await agent.restore(NAME)).replica, pb.RUNG_PARKED) == ""
    before = engines(agent)
    for _ in range(2):
        assert (await agent.unstage(NAME, pb.RUNG_STANDBY)).residency.rung == pb.RUNG_STANDBY
        assert stopped(before) == {True}
        assert (await agent.unstage(NAME, pb.RUNG_STANDBY)).residency.rung == pb.RUNG_STANDBY, "and is there already"
        assert (await agent.stage(NAME, pb.RUNG_PARKED)).residency.rung == pb.RUNG_PARKED
        assert stopped(before) == {False}
        assert (await agent.stage(NAME, pb.RUNG_STANDBY)).residency.rung == pb.RUNG_PARKED, "which is higher"
    await agent.unstage(NAME, pb.RUNG_STANDBY)
    woken = (await agent.restore(NAME)).replica
    assert (woken.origin, engines(agent)) == (pb.ORIGIN_STANDBY, before)
    assert get(woken, "/sum") == agent.recorded_answer(NAME)


async def test_parking_twice_makes_one(agent: Agent) -> None:
    await asyncio.gather(*(agent.stage(NAME, pb.RUNG_PARKED) for _ in range(3)))
    assert len(engines(agent)) == 1
    one, two = await asyncio.gather(agent.restore(NAME), agent.restore(NAME))
    assert {one.replica.origin, two.replica.origin} == {pb.ORIGIN_PARKED, pb.ORIGIN_RESTORED}
    assert get(one.replica, "/sum") == get(two.replica, "/sum") == agent.recorded_answer(NAME)


async def test_an_idle_replica_takes_the_place_of_a_standby_but_not_of_a_parked_one(agent: Agent) -> None:
    one, two = (await agent.restore(NAME)).replica, (await agent.restore(NAME)).replica
    await agent.stage(NAME, pb.RUNG_STANDBY)
    assert await agent.demote(one, pb.RUNG_PARKED) == ""
    assert await agent.rung(NAME) == pb.RUNG_PARKED
    assert len(engines(agent)) == 2
    assert "has a standby" in await agent.demote(two, pb.RUNG_PARKED)
    assert len(engines(agent)) == 1


async def test_one_that_is_not_used_goes_down_rung_by_rung(agent: Agent) -> None:
    rungs: list[int] = []

    async def watch() -> None:
        async for update in agent.stub.Watch(pb.WatchRequest()):
            if update.HasField("residency") and rungs[-1:] != [update.residency.rung]:
                rungs.append(update.residency.rung)
                if rungs[-3:] == [pb.RUNG_PARKED, pb.RUNG_STANDBY, pb.RUNG_MEMORY]:
                    return

    await agent.stage(NAME)
    watching = asyncio.create_task(watch())
    replica = (await agent.restore(NAME)).replica
    assert await agent.demote(replica, pb.RUNG_PARKED, keep_seconds=0.2, standby_seconds=0.2) == ""
    await asyncio.wait_for(watching, 10)
    async with asyncio.timeout(5):
        while engines(agent):
            await asyncio.sleep(0.02)  # the kernel is taking the pid namespace down


async def test_a_restore_waits_for_a_move_and_wakes_what_was_moved(agent: Agent) -> None:
    await agent.stage(NAME, pb.RUNG_PARKED)
    before = engines(agent)
    for move in (agent.unstage(NAME, pb.RUNG_STANDBY), agent.stage(NAME, pb.RUNG_PARKED)):
        _, answer = await asyncio.gather(move, agent.restore(NAME))
        assert answer.replica.origin in (pb.ORIGIN_PARKED, pb.ORIGIN_STANDBY)
        assert before[0] in engines(agent)
        assert get(answer.replica, "/sum") == agent.recorded_answer(NAME)
        await agent.unstage(NAME, pb.RUNG_MEMORY)  # what the move may have made anew
        assert engines(agent) == before
        assert await agent.demote(answer.replica, pb.RUNG_STANDBY) == ""


async def test_a_caller_that_leaves_leaves_it_on_a_rung(agent: Agent) -> None:
    await agent.stage(NAME, pb.RUNG_STANDBY)
    before = engines(agent)
    for delay in (0.0, 0.002, 0.005, 0.01):
        for call in (agent.stage(NAME, pb.RUNG_PARKED), agent.unstage(NAME, pb.RUNG_STANDBY)):
            leaving = asyncio.create_task(call)
            await asyncio.wait([leaving], timeout=delay)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
    assert engines(agent) == before
    answer = await agent.restore(NAME)
    assert answer.replica.origin in (pb.ORIGIN_PARKED, pb.ORIGIN_STANDBY)
    assert get(answer.replica, "/sum") == agent.recorded_answer(NAME)


async def test_a_killed_one_is_not_offered(agent: Agent) -> None:
    await agent.stage(NAME, pb.RUNG_PARKED)
    await until(lambda: engines(agent), "its processes are seen")
    for pid in engines(agent):
        os.kill(pid, signal.SIGKILL)
    await agent.until_rung(NAME, pb.RUNG_MEMORY)
    answer = await agent.restore(NAME)
    assert answer.replica.origin == pb.ORIGIN_RESTORED
    assert get(answer.replica, "/sum") == agent.recorded_answer(NAME)


async def test_a_user_parks_one_and_has_it_back(agent: Agent, tmp_path: Path) -> None:
    where = "--state", str(agent.state)
    assert f"default/{NAME}@" in (said := await zerowake("park", NAME, *where)) and "parked after" in said
    assert await agent.rung(NAME) == pb.RUNG_PARKED
    assert "nothing of it is parked" in await zerowake("park", NAME, "--back", *where)
    assert await agent.rung(NAME) == pb.RUNG_STANDBY
    await zerowake("park", NAME, "--keep", "0.1", "--standby-seconds", "0.1", *where)
    await agent.until_rung(NAME, pb.RUNG_MEMORY)
    assert "no agent runs on" in await zerowake("park", NAME, "--state", str(tmp_path / "none"), code=1)
    assert "--parked-bytes 'much' is no size, such as 80GiB" in await zerowake("agent", *where, "--parked-bytes", "much", code=1)
    assert "--memory '50%' is no size, such as 80GiB" in await zerowake("agent", *where, "--memory", "50%", code=1)
    assert "--disk 'all' is no size, such as 80GiB" in await zerowake("agent", *where, "--disk", "all", code=1)


async def test_dropping_one_leaves_nothing(agent: Agent, lender: Served) -> None:
    await agent.stage(NAME, pb.RUNG_PARKED)
    assert (await agent.unstage(NAME, pb.RUNG_MEMORY)).residency.rung == pb.RUNG_MEMORY
    assert engines(agent) == []
    await agent.stage(NAME, pb.RUNG_PARKED)
    await agent.unstage(NAME, pb.RUNG_ABSENT)
    assert engines(agent) == []


@pytest.mark.parametrize("milliseconds", [5, 40, 120, 400])
async def test_an_agent_that_is_killed_meanwhile_leaves_nothing(quiet: Path, lender: Served, tmp_path: Path, milliseconds: int) -> None:
    """While it restores, parks, has parked and moves down."""
    state = copy_state(quiet, tmp_path / "state")

    async def up_and_down(agent: Agent) -> None:
        with contextlib.suppress(Exception):
            while True:
                await agent.stage(NAME, pb.RUNG_PARKED)
                await agent.unstage(NAME, pb.RUNG_STANDBY)

    async with running(state, "--gpumem", str(lender.socket)) as agent:
        await agent.stage(NAME)
        call = asyncio.create_task(up_and_down(agent))
        await asyncio.wait([call], timeout=milliseconds / 1000)
        pids = engines(agent)
        agent.kill()
        await agent.process.wait()
        await call
        await nothing_left(state)
    assert not [pid for pid in pids if alive(pid)]
    assert lent(lender) == 0
    async with running(state, "--gpumem", str(lender.socket)) as agent:
        await agent.stage(NAME, pb.RUNG_PARKED)
        assert get((await agent.restore(NAME)).replica, "/sum") == agent.recorded_answer(NAME)
