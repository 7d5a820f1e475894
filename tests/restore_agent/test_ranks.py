"""An engine of two ranks, restored by CRIU: each with weights of its own, talking over shared memory of the host's and over memory lent by
gpumem, in launches captured once; on every rung; and one rank killed.

Without a GPU: what CUDA has to do with it is in test_cuda.py and test_gpu_choice.py, and with GPUs in tests/bench/gpu/ranks.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from zerowake_proto import agent_pb2 as pb

from gpumem.checkpoint.safetensors import keep_reading, read_checkpoint
from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import Agent, get
from tests.worlds.checkpoints import SIZES, write_checkpoint
from tests.worlds.collective_on_processor import build
from tests.worlds.gpumem_server import Served
from tests.worlds.lending import capture, lending_agent, lent
from tests.worlds.processes import alive, below
from tests.worlds.waiting import until

NAME, RANKS = "ranked", 2


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory, lender: Served) -> Path:
    """A state folder with the snapshot of two ranks, restored twice for its proof."""
    folder = tmp_path_factory.mktemp("ranked")
    for number in range(RANKS):
        weights = folder / "weights" / f"rank-{number}"
        write_checkpoint(weights, SIZES["small"], shards=number + 1)  # each holds something else
        keep_reading(weights, read_checkpoint(weights))
    words = (str(folder / "weights"), str(RANKS), str(build(folder)))
    asyncio.run(capture(folder / "state", lender, NAME, "tests.worlds.ranked_engine", *words))
    return folder / "state"


@pytest.fixture
async def agent(taken: Path, lender: Served, tmp_path: Path) -> AsyncIterator[Agent]:
    async with lending_agent(taken, tmp_path / "state", lender) as agent:
        yield agent


def processes(agent: Agent) -> dict[str, int]:
    """Host pids of the engine that is there: its first process's and its ranks'."""
    found = {}
    for _, pid, words in below(agent.process.pid):
        if "ranked_engine" in words and "sandbox-init" not in words and alive(pid):
            parts = words.split()
            found[f"rank {parts[parts.index('rank') + 1]}" if "rank" in parts else "first"] = pid
    return found


async def answers_as_before(agent: Agent, origin: pb.Origin) -> pb.Replica:
    answer = await agent.restore(NAME)
    assert answer.replica.origin == origin, answer.fallback_detail
    assert get(answer.replica, "/sum") == agent.recorded_answer(NAME)
    return answer.replica


def test_the_snapshot_knows_each_rank_s_weights_and_where_they_were_lent(taken: Path) -> None:
    manifest = Catalog(taken).get("default", NAME).manifest
    assert [record.gpu for record in manifest.weights] == ["host"] * RANKS
    assert len({record.region for record in manifest.weights}) == RANKS
    assert manifest.canary
    answer = json.loads(manifest.canary.answer)
    assert (len(answer["digests"]), len(answer["totals"])) == (1, 1), "all ranks came to the same, by each way"
    assert len([process for process in manifest.processes if "rank" in process.command.split()]) == RANKS


async def test_a_restored_engine_s_ranks_talk_on_over_the_memory_that_they_shared(agent: Agent, lender: Served) -> None:
    one, two = [await answers_as_before(agent, pb.ORIGIN_RESTORED) for _ in range(2)]
    assert lent(lender) == 2 * RANKS
    assert len([lease for lease in lender.status().leases if lease.joined]) == 2 * RANKS, "each has the other's memory, of its own engine"
    assert get(one, "/sum") == get(two, "/sum") == agent.recorded_answer(NAME), "and each over its own"


async def test_on_every_rung_and_back(agent: Agent, lender: Served) -> None:
    await agent.stage(NAME, pb.RUNG_STANDBY)
    replica = await answers_as_before(agent, pb.ORIGIN_STANDBY)
    before = processes(agent)
    for rung, origin in ((pb.RUNG_PARKED, pb.ORIGIN_PARKED), (pb.RUNG_STANDBY, pb.ORIGIN_STANDBY)):
        assert await agent.demote(replica, rung) == ""
        assert lent(lender) == 0, "no rank holds anything that is lent"
        replica = await answers_as_before(agent, origin)
        assert processes(agent) == before
    await agent.release(replica)
    await agent.stage(NAME, pb.RUNG_PARKED)
    await agent.unstage(NAME, pb.RUNG_STANDBY)
    await agent.stage(NAME, pb.RUNG_PARKED)
    await answers_as_before(agent, pb.ORIGIN_PARKED)


@pytest.mark.parametrize("rank", ["rank 0", "rank 1"])
@pytest.mark.parametrize("how", ["restored ahead", "idle, standby", "idle, parked"])
async def test_an_engine_that_has_lost_a_rank_while_it_waited_is_not_woken(agent: Agent, how: str, rank: str) -> None:
    if how == "restored ahead":
        await agent.stage(NAME, pb.RUNG_STANDBY)
    else:
        replica = await answers_as_before(agent, pb.ORIGIN_RESTORED)
        assert await agent.demote(replica, pb.RUNG_PARKED if "parked" in how else pb.RUNG_STANDBY) == ""
    before = processes(agent)
    os.kill(before[rank], signal.SIGKILL)
    await until(lambda: not alive(before[rank]))
    await answers_as_before(agent, pb.ORIGIN_RESTORED)
    await until(lambda: not any(map(alive, before.values())))


async def test_an_engine_that_loses_a_rank_as_it_serves_ends_whole_and_is_made_anew(agent: Agent) -> None:
    replica = await answers_as_before(agent, pb.ORIGIN_RESTORED)
    before = processes(agent)
    os.kill(before["rank 1"], signal.SIGKILL)
    await until(lambda: not any(map(alive, before.values())))
    async with asyncio.timeout(10):
        while replica.id in await agent.live_replicas():
            await asyncio.sleep(0.02)
    await answers_as_before(agent, pb.ORIGIN_RESTORED)


async def test_a_rank_that_is_killed_while_it_is_restored_is_the_end_of_that_restore_alone(agent: Agent) -> None:
    """Whenever it is: the call ends, and the next one has an engine that is whole."""
    await agent.stage(NAME)
    restoring = asyncio.create_task(agent.restore(NAME))
    while not restoring.done() and "rank 1" not in processes(agent):
        await asyncio.sleep(0.001)
    struck = processes(agent).get("rank 1")
    assert struck, "it was not seen before the call ended"
    os.kill(struck, signal.SIGKILL)
    answer = await asyncio.wait_for(restoring, 60)
    assert answer.replica.origin in (pb.ORIGIN_COLD, pb.ORIGIN_RESTORED)
    if answer.replica.origin == pb.ORIGIN_COLD:
        assert answer.fallback_reason, answer
        await agent.release(answer.replica)
    await until(lambda: not alive(struck))
    await answers_as_before(agent, pb.ORIGIN_RESTORED)
