"""An agent's calls over gRPC: what it says of its errors, and how its node is shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import grpc
import pytest
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activations, TraceContext
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import Agent, AgentError, AgentSilent, AgentUnreachable, HasNone, NoRoom, Wanted
from scaler.fleet.snapshot_peers import SnapshotPeer
from scaler.plan.rungs import Rung
from scaler.plan.world import Residency, Transfer
from tests.worlds import fake_agent
from tests.worlds.virtual_time import run
from tests.worlds.waiting import until

NAME = SnapshotName("ns", "chat")


@pytest.fixture
async def there() -> AsyncIterator[tuple[Agent, fake_agent.Agent]]:
    other = fake_agent.Agent("n")
    async with other.serve() as address, grpc.aio.insecure_channel(address) as channel:
        yield Agent(address, agent_pb2_grpc.AgentStub(channel)), other


async def test_calls_name_the_snapshot_and_each_its_request(there: tuple[Agent, fake_agent.Agent]) -> None:
    agent, other = there
    assert await agent.stage(NAME, "d", Rung.MEMORY) == pytest.approx(0.1)
    await agent.stage(NAME, "d", Rung.STANDBY, urgent=True)
    assert [each.urgent for each in other.staged] == [False, True]
    assert [(each.snapshot.name, each.snapshot.digest, each.rung) for each in other.staged] == [
        ("chat", "d", agent_pb2.RUNG_MEMORY),
        ("chat", "d", agent_pb2.RUNG_STANDBY),
    ]
    assert len({each.request_id for each in other.staged}) == 2
    other.complaints, said = ["m has other bytes"], list[str]()
    await agent.stage(NAME, "d", Rung.MEMORY, [SnapshotPeer("m", "10.0.0.2:9447", True)], ["s3://b/p"], said.append)
    assert said == ["m has other bytes"]
    assert list(other.staged[-1].peers) == [agent_pb2.Peer(node="m", address="10.0.0.2:9447", complete=True)]
    await agent.unstage(NAME, "d", seconds=5.0)
    assert [each.rung for each in other.unstaged] == [agent_pb2.RUNG_ABSENT]
    other.has("ns", "chat", "d", rung=agent_pb2.RUNG_MEMORY)
    await agent.unstage(NAME, "d", seconds=5.0, rung=Rung.DISK)
    assert agent.residencies[NAME].rung is Rung.DISK, "by the answer, whatever the stream says later"


async def test_a_replica_is_kept_parked_and_then_as_a_standby(there: tuple[Agent, fake_agent.Agent]) -> None:
    agent, other = there
    await agent.stand_by("r1", 60.0)
    await agent.park("r2", 0.0, 0.0)
    await agent.park("r3", 300.0, 3600.0)
    asked = [(each.replica_id, each.rung, each.keep_seconds, each.standby_seconds) for each in other.demoted]
    assert asked == [
        ("r1", agent_pb2.RUNG_STANDBY, 60.0, 0.0),
        ("r2", agent_pb2.RUNG_PARKED, 0.0, 0.0),
        ("r3", agent_pb2.RUNG_PARKED, 300.0, 3600.0),
    ]
    await agent.park("r4", 300.0, None)
    assert 0 < other.demoted[-1].standby_seconds < 1, "0 would keep it for ever"
    assert len({each.request_id for each in other.demoted}) == 4
    other.refuse_above = agent_pb2.RUNG_STANDBY
    with pytest.raises(NoRoom, match="no room for it"):
        await agent.park("r5", 0.0, 0.0)


async def test_a_replica_sleeps_in_its_pod_and_is_woken(there: tuple[Agent, fake_agent.Agent]) -> None:
    agent, other = there
    other.runs("r1", "m")
    await agent.sleep("r1", Rung.PARKED)
    assert (other.demoted[0].replica_id, other.demoted[0].rung) == ("r1", agent_pb2.RUNG_PARKED)
    activation = Activations().begin("m")
    activation.trace = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "a=b")
    assert (await agent.wake("r1", activation)).state == agent_pb2.REPLICA_READY
    assert [(each.replica_id, each.activation_id) for each in other.woken] == [("r1", activation.id)]
    assert activation.trace._asdict().items() <= other.told.items()
    other.wanted = True
    with pytest.raises(Wanted, match="a request has just come"):
        await agent.sleep("r1", Rung.PARKED)
    other.asleep_on["r1"] = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(NoRoom, match="its GPU is full"):
        await agent.wake("r1", None)


async def test_errors_say_what_the_agent_said(there: tuple[Agent, fake_agent.Agent]) -> None:
    agent, other = there
    with pytest.raises(HasNone, match="no such snapshot"):
        await agent.unstage(NAME, "d", seconds=5.0)
    other.refuse = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(NoRoom, match="no room for it"):
        await agent.stage(NAME, "d", Rung.MEMORY)


async def test_what_a_store_has_is_asked_of_the_agent_and_a_refusal_says_what_the_store_did(
    there: tuple[Agent, fake_agent.Agent],
) -> None:
    agent, other = there
    other.find_fails = ("denied", "403 Forbidden")
    with pytest.raises(AgentError, match="403 Forbidden") as raised:
        await agent.find(NAME, "s3://b/p")
    assert raised.value.reason == "denied"
    other.find_fails, other.in_store = None, agent_pb2.FindResponse(snapshot=other.asked[0].snapshot, template_hash="t")
    assert (await agent.find(NAME, "s3://b/p")).template == "t"
    assert [(each.snapshot.namespace, each.snapshot.name, each.store) for each in other.asked] == [("ns", "chat", "s3://b/p")] * 2
    assert other.asked[0].request_id != other.asked[1].request_id


async def test_an_agent_that_is_not_there() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        agent = Agent("127.0.0.1:1", agent_pb2_grpc.AgentStub(channel))
        with pytest.raises(AgentUnreachable):
            await agent.stage(NAME, "d", Rung.MEMORY)
        with pytest.raises(AgentUnreachable):
            await agent.release("r")
        with pytest.raises(AgentUnreachable):
            await agent.stand_by("r", 0.0)
        with pytest.raises(AgentUnreachable):
            await agent.park("r", 0.0, None)
        with pytest.raises(AgentUnreachable):
            await agent.restore("chat", NAME, None, None)


async def test_who_asks_hears_of_it_when_the_channel_is_closed_under_him() -> None:
    """gRPC ends such a call as if its caller had been cancelled. One who is cancelled indeed, is."""
    other = fake_agent.Agent("n")
    other.find_opens.clear()
    other.store_opens.clear()
    async with other.serve() as address:
        channel = grpc.aio.insecure_channel(address)
        agent = Agent(address, agent_pb2_grpc.AgentStub(channel))
        finding, pushing, cancelled = (
            asyncio.ensure_future(work)
            for work in (agent.find(NAME, "s3://b"), agent.push(NAME, "d", "s3://b"), agent.find(NAME, "s3://c"))
        )
        await until(lambda: len(other.asked) == 2 and other.pushed)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await channel.close()
        for each in (finding, pushing):
            with pytest.raises(AgentUnreachable, match="given up"):
                await each


class Stub:
    """An agent's calls that end when the test says so."""

    def __init__(self) -> None:
        self.answer = asyncio.get_running_loop().create_future()

    def Stage(self, request: agent_pb2.StageRequest) -> asyncio.Future[agent_pb2.StageResponse]:
        return self.answer


def test_what_is_staged_is_waited_for_while_its_agent_speaks() -> None:
    async def staged() -> tuple[float, float]:
        stub = Stub()
        agent = Agent("a", cast("agent_pb2_grpc.AgentAsyncStub", stub))
        staging = asyncio.create_task(agent.stage(NAME, "d", Rung.DISK))
        for _ in range(200):
            await asyncio.sleep(25.0)
            agent.speaks()
        stub.answer.set_result(agent_pb2.StageResponse(seconds=7.0))
        return await staging, asyncio.get_running_loop().time()

    assert run(staged()) == (7.0, 5000.0)


def test_what_is_staged_is_given_up_when_its_agent_has_said_nothing_for_half_a_minute() -> None:
    async def given_up() -> tuple[bool, float]:
        stub = Stub()
        agent = Agent("a", cast("agent_pb2_grpc.AgentAsyncStub", stub))
        staging = asyncio.create_task(agent.stage(NAME, "d", Rung.DISK))
        await asyncio.sleep(15.0)
        agent.speaks()
        with pytest.raises(AgentSilent, match=r"its agent was asked and has said nothing for 30 s"):
            await staging
        return stub.answer.cancelled(), asyncio.get_running_loop().time()

    assert run(given_up()) == (True, 50.0)


async def test_what_the_stream_has_said_since_counts_more_than_an_answer_that_it_overtook() -> None:
    async def staged(revision: int) -> Residency | None:
        stub = Stub()
        agent.stub = cast("agent_pb2_grpc.AgentAsyncStub", stub)
        staging = asyncio.create_task(agent.stage(NAME, "d", Rung.DISK))
        await asyncio.sleep(0)
        agent.settle(NAME, None, 6)
        told = agent_pb2.Residency(snapshot=agent_pb2.SnapshotRef(digest="d"), rung=agent_pb2.RUNG_DISK, revision=revision)
        stub.answer.set_result(agent_pb2.StageResponse(residency=told))
        await staging
        return agent.residencies.get(NAME)

    agent = Agent("a", cast("agent_pb2_grpc.AgentAsyncStub", None))
    assert await staged(5) is None, "it was removed since"
    there = await staged(7)
    assert there is not None and there.rung is Rung.DISK, "it has come again since"
    agent.carry(Transfer(NAME, "d", Rung.DISK, 1, 2), ended=False)
    agent.begins()
    assert agent.node.transfers == (), "it says anew what is on its way"
    agent.settle(NAME, Residency("d", Rung.MEMORY, 7), 1)
    assert agent.residencies[NAME].rung is Rung.MEMORY, "another program on the node counts from the beginning"
    assert await staged(0) is not None, "an older agent does not count what it says"


async def test_a_pin_names_the_rung_and_what_the_agent_answers_counts(there: tuple[Agent, fake_agent.Agent]) -> None:
    agent, other = there
    other.has("ns", "chat", "d")
    await agent.pin(NAME, "d", Rung.DISK)
    assert [(each.snapshot.digest, each.rung, bool(each.request_id)) for each in other.pinned] == [("d", agent_pb2.RUNG_DISK, True)]
    assert agent.residencies[NAME].pinned is Rung.DISK
    other.refuse = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(AgentError, match="its disk is read-only"):
        await agent.pin(NAME, "d", Rung.ABSENT)
