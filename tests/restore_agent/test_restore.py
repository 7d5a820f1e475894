"""Snapshots taken and restored by a real agent and a real CRIU: what comes back is the process that was dumped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog
from restore_agent.snapshots.page_runs import PAGE
from tests.worlds.agent import Agent, engine, get, reference, running
from tests.worlds.leftovers import left_behind, nothing_left


async def test_every_page_comes_back(agent: Agent) -> None:
    """Anonymous memory, heap, sparse memory, written pages of a mapped file, shared memory, a deleted file, a child process."""
    answer = await agent.restore("small")
    assert answer.fallback_detail == ""
    assert answer.replica.origin == pb.ORIGIN_RESTORED
    assert get(answer.replica, "/sum") == agent.recorded_answer()
    names = [phase.name for phase in answer.replica.phases]
    assert names[-1] == "unaccounted"
    assert {"image.sandbox", "image.criu", "image.fill"} <= set(names)
    assert get(answer.replica, "/sum") == agent.recorded_answer(), "and again, now that the child has gone on"


@pytest.fixture
async def comparing(state: Path) -> AsyncIterator[Agent]:
    """An agent that compares every page of what it restores with its image, and says so in its log."""
    async with running(state, program="tests.worlds.compared") as agent:
        yield agent
    await nothing_left(state)
    assert left_behind(state) == []


async def test_every_page_of_a_restored_tree_is_the_image_s(comparing: Agent) -> None:
    """Two processes; while the image comes from disk, from memory, and twice at once."""
    for calls in (1, 1, 2):
        for answer in await asyncio.gather(*(comparing.restore("small") for _ in range(calls))):
            assert answer.replica.origin == pb.ORIGIN_RESTORED, answer.fallback_detail
    lines = [line for line in (comparing.state.parent / "agent.log").read_text().splitlines() if line.startswith("compared ")]
    assert len(lines) == 4
    for line in lines:
        filled, kept, _ = (int(word) for word in line.split() if word.isdigit())
        assert filled * PAGE > 17 << 20, "8 MiB of content in each of two processes, and a sparse megabyte"
        assert kept > 100


async def test_most_pages_are_ours_and_zeros_are_left_out(agent: Agent) -> None:
    manifest = Catalog(agent.state).get("default", "small").manifest
    assert manifest.skeleton_bytes < 4 << 20
    # The server and its child have written 64 MiB each, of which 1 MiB is no zeros.
    assert 9 << 20 < manifest.page_bytes < 128 << 20
    assert manifest.host_bytes - manifest.page_bytes > 120 << 20
    assert len(manifest.processes) >= 2


async def test_replicas_restored_at_once_are_apart(agent: Agent) -> None:
    answers = await asyncio.gather(*(agent.restore("small") for _ in range(4)))
    replicas = [answer.replica for answer in answers]
    assert len({replica.id for replica in replicas}) == 4
    first = get(replicas[0], "/count")
    get(replicas[0], "/count")
    assert [get(replica, "/count") for replica in replicas[1:]] == [first] * 3, "a request to one is not seen by another"
    assert get(replicas[3], "/sum") == agent.recorded_answer()


async def test_a_snapshot_on_disk_is_staged_on_the_way(agent: Agent) -> None:
    await agent.stage("small")
    assert (await agent.unstage("small")).residency.rung == pb.RUNG_DISK
    answer = await agent.restore("small")
    assert answer.replica.origin == pb.ORIGIN_RESTORED
    assert (await agent.stage("small")).residency.rung == pb.RUNG_MEMORY


async def test_the_same_request_again_makes_nothing_twice(agent: Agent) -> None:
    one, two = await asyncio.gather(agent.restore("small", request_id="r1"), agent.restore("small", request_id="r1"))
    three = await agent.restore("small", request_id="r1")
    assert one.replica.id == two.replica.id == three.replica.id


async def test_a_caller_that_leaves_leaves_no_replica(agent: Agent) -> None:
    await agent.stage("small")
    for delay in (0.0, 0.01, 0.02, 0.03, 0.05):
        call = asyncio.create_task(agent.restore("small"))
        await asyncio.wait([call], timeout=delay)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    kept = await agent.restore("small")
    assert await agent.live_replicas() <= {kept.replica.id} | await finished_before_cancel(agent, kept)


async def finished_before_cancel(agent: Agent, kept: pb.RestoreResponse) -> set[str]:
    """A restore that had ended when its caller left is a replica like any other: it can be released."""
    others = await agent.live_replicas() - {kept.replica.id}
    for replica_id in others:
        await agent.release(pb.Replica(id=replica_id))
    assert await agent.live_replicas() == {kept.replica.id}
    return others


async def test_watchers_hear_of_an_engine_that_ends(agent: Agent) -> None:
    replica = (await agent.restore("small")).replica
    call = agent.stub.Watch(pb.WatchRequest())
    async with asyncio.timeout(10):
        async for update in call:
            if update.synced:
                with pytest.raises(OSError):
                    get(replica, "/exit")
            if update.replica.state == pb.REPLICA_GONE:
                assert update.replica.id == replica.id
                assert "exit code 3" in update.replica.detail
                break
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await agent.release(replica)  # while it is still being taken down this waits for that
        await agent.release(replica)
    assert gone.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_replica_is_gone_when_release_returns(agent: Agent) -> None:
    replica = (await agent.restore("small")).replica
    await agent.release(replica)
    assert not Path(replica.endpoint.netns).exists()


async def test_an_engine_starts_cold_without_a_snapshot(agent: Agent, mapped: Path) -> None:
    answer = await agent.stub.Restore(pb.RestoreRequest(request_id="cold", model="plain", cold=engine(mapped)))
    assert answer.replica.origin == pb.ORIGIN_COLD
    assert answer.fallback_reason == ""
    get(answer.replica, "/sum")


async def test_the_source_goes_on_serving_if_asked(agent: Agent, mapped: Path) -> None:
    result = await agent.snapshot("kept", engine(mapped), keep_serving=True)
    assert result.replica_id in await agent.live_replicas()
    restored = await agent.restore("kept")
    assert get(restored.replica, "/sum") is not None


async def test_an_engine_that_answers_from_a_cache_the_second_time_is_proved(agent: Agent, mapped: Path) -> None:
    """What the recorded request leaves in the engine is in the image: a replica answers as the source would a second time."""
    await agent.snapshot("caching", engine(mapped), canary=pb.Canary(path="/cached"))
    restored = await agent.restore("caching")
    assert restored.replica.origin == pb.ORIGIN_RESTORED
    assert get(restored.replica, "/cached") == {"again": True}


async def test_a_replica_prints_on_after_its_restore(agent: Agent) -> None:
    """Its pipes are the agent's: a full one would stop the engine."""
    replica = (await agent.restore("small")).replica
    for _ in range(1200):
        get(replica, "/count")


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (pb.RestoreRequest(request_id="a", model="m"), "snapshot and cold"),
        (pb.RestoreRequest(request_id="b", snapshot=reference("small")), "model"),
        (pb.RestoreRequest(model="m", snapshot=reference("small")), "request_id"),
        (pb.RestoreRequest(request_id="c", model="m", snapshot=reference("../small")), "not allowed"),
        (pb.RestoreRequest(request_id="d", model="m", snapshot=pb.SnapshotRef(namespace="a/b", name="small")), "not allowed"),
        (pb.RestoreRequest(request_id="e", model="m", cold=pb.Engine(command=["x"])), "engine.port"),
    ],
)
async def test_bad_requests_are_named(agent: Agent, request_: pb.RestoreRequest, word: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=word) as refused:
        await agent.stub.Restore(request_)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
