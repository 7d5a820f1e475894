"""What goes wrong while a GPU server is parked, or on its way there and back; and who gives way on a GPU that is full.

The same cases run on the host's memory where they need no GPU. Every case prints what it saw (`-s` shows it).
"""

from __future__ import annotations

import asyncio
import json

import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.sequences.placement import HEADROOM
from restore_agent.snapshots.catalog import Catalog
from tests.bench.gpu.resume import until_rung
from tests.bench.restore import at_zero, status
from tests.worlds.agent import Agent
from tests.worlds.leftovers import nothing_left
from tests.worlds.node import MIB, NAME, SAME, Node
from tests.worlds.processes import below
from tests.worlds.strike import Case, another_in_its_place, engine_pids, failing, killing, the_agent_leaves_nothing


async def parked(node: Node, agent: Agent, made: str) -> None:
    if made == "ahead":
        await agent.stage(NAME, pb.RUNG_PARKED)
    else:
        assert await agent.demote(await node.restored(), pb.RUNG_PARKED) == ""


@pytest.mark.parametrize("made", ["ahead", "idle"])
@pytest.mark.parametrize("victim", ["engine", "agent"])
def test_killed_when_it_is_parked(case: Case, victim: str, made: str) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        await parked(node, agent, made)
        assert engine_pids(node, agent)
        if victim == "agent":
            await the_agent_leaves_nothing(node, agent)
            return
        await another_in_its_place(node, agent, pb.RUNG_PARKED)

    case(body)


@pytest.mark.parametrize("phase", ["CRIU makes the processes", "CUDA resumes", "CUDA resumes, 100 ms on"])
@pytest.mark.parametrize("victim", ["engine", "agent"])
def test_killed_while_it_is_parked(case: Case, request: pytest.FixtureRequest, victim: str, phase: str) -> None:
    if "CUDA" in phase:
        request.getfixturevalue("gpu_only")

    async def body(node: Node) -> None:
        agent = await node.agent()
        await agent.stage(NAME)
        async with killing(node, victim, phase) as call_began:
            call = asyncio.create_task(agent.stage(NAME, pb.RUNG_PARKED))
            call_began(call)
        if victim == "agent":
            await agent.process.wait()
            await nothing_left(node.state)
            return
        print(f"  staging ends by {call.exception()!r}")
        async with asyncio.timeout(10):
            while await agent.rung(NAME) != pb.RUNG_MEMORY:
                await asyncio.sleep(0.02)  # what has ended is dropped
        assert engine_pids(node, agent) == []

    case(body)


@pytest.mark.parametrize("made", ["ahead", "idle"])
def test_a_parked_engine_that_fails_as_it_wakes(case: Case, made: str) -> None:
    """Where the agent sees its end before it answers, it restores another one in its place, which fails here, too."""

    async def body(node: Node) -> None:
        agent = await node.agent()
        await parked(node, agent, made)
        node.fault.write_text("exit")
        said = await failing(node, agent, {pb.ORIGIN_PARKED, pb.ORIGIN_RESTORED})
        print(f"  the replica: {said}")
        assert "exit code 70" in said and "told to fail" in said

    case(body)


def test_weights_that_cannot_be_brought_end_the_parked_one(case: Case) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        await parked(node, agent, "ahead")
        await node.evict()
        async with node.pool_held():
            answer = await agent.restore(NAME, cold=node.stand_in())
            print(f"  {answer.fallback_reason}: {answer.fallback_detail}")
            assert answer.fallback_reason == "weights-failed"
            left = [words for _, _, words in below(agent.process.pid) if "faulty_engine" in words and "sandbox-init" not in words]
            assert left == [], "neither it nor the one that was restored in its place"
            await agent.release(answer.replica)

    case(body)


def test_a_model_that_is_kept_parked_is_woken_by_each_request(case: Case) -> None:
    """The whole system: raised from memory to standby to parked, woken, idle, parked, woken again."""

    async def body(node: Node) -> None:
        async with node.gateway(stage="parked", cooldown_seconds=0.2) as ask:
            for _ in range(3):
                await until_rung(node.state, "parked")
                await at_zero(node.state)
                status_, text, seconds = await ask()
                activation = (await status(node.state))["activations"][0]
                print(f"  {status_} after {seconds:.3f} s: {activation}")
                assert (status_, json.loads(text)) == (200, node.expected)
                assert (activation["outcome"], activation["origin"]) == ("served", "parked")

    case(body)


@pytest.mark.usefixtures("gpu_only")
def test_what_a_parked_one_holds_is_said_and_given_back(case: Case) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        await agent.stage(NAME, pb.RUNG_STANDBY)
        before = node.used()
        held = list((await agent.stage(NAME, pb.RUNG_PARKED)).residency.parked_bytes)
        more = node.used() - before
        print(f"  parked it holds {more / MIB:.0f} MiB, and says {held[0] / MIB:.0f}")
        assert len(held) == 1 and abs(more - held[0]) < SAME
        await agent.unstage(NAME, pb.RUNG_STANDBY)
        assert abs(node.used() - before) < SAME
        replica = (await agent.restore(NAME)).replica
        await node.answers(replica, node.expected)
        assert await agent.demote(replica, pb.RUNG_PARKED) == ""
        (again,) = (await agent.stage(NAME, pb.RUNG_PARKED)).residency.parked_bytes
        assert abs(again - held[0]) < SAME, "and the same of one that ran"

    case(body)


@pytest.mark.usefixtures("gpu_only")
def test_a_parked_one_gives_way_on_a_full_gpu(case: Case) -> None:
    """Another engine is restored, and the pool has nothing to give."""

    async def body(node: Node) -> None:
        agent = await node.agent()
        await node.capture("other")
        await agent.stage("other")
        await agent.stage(NAME, pb.RUNG_PARKED)
        needed = max(Catalog(node.state).get("default", "other").manifest.gpus.values()) + HEADROOM
        # The other one needs the weights, which are there; all else of the pool is taken.
        async with node.pool_held():
            with node.hog(leave=needed // 2):
                answer = await agent.restore("other", cold=node.stand_in())
                assert answer.fallback_detail == ""
                assert answer.replica.origin == pb.ORIGIN_RESTORED
                await node.answers(answer.replica, node.expected)
                assert await agent.rung(NAME) == pb.RUNG_STANDBY
                await agent.release(answer.replica)
        woken = await agent.restore(NAME)
        assert woken.replica.origin == pb.ORIGIN_STANDBY
        await node.answers(woken.replica, node.expected)
        await agent.unstage("other", pb.RUNG_ABSENT)

    case(body)
