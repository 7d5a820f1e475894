"""A request again, by its id: it joins the work or gets its answer, and what nobody waits for any more is undone. Over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.sequences.memory_budget import NoMemory
from restore_agent.service import requests as requests_module
from restore_agent.service.requests import Requests
from tests.worlds.agent_service import World, reference, served_node
from tests.worlds.snapshots import publish
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with served_node(tmp_path) as world:
        yield world


class Work:
    """A release that ends when it is told to."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, _: str) -> None:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error


@pytest.fixture
def work(world: World, monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    monkeypatch.setattr(world.node, "release", work)
    return work


def release(world: World, request_id: str = "1") -> Any:
    return world.stub.Release(pb.ReleaseRequest(request_id=request_id, replica_id="x"))


async def test_a_request_again_joins_the_first_and_later_gets_its_answer(world: World, work: Work) -> None:
    first, second, other = release(world), release(world), release(world, "2")
    await until(lambda: work.begun == 2)
    work.go.set()
    await asyncio.gather(first, second, other)
    await release(world)
    assert work.begun == 2, "one a request_id"


async def test_the_same_id_of_another_method_is_another_request(world: World, work: Work) -> None:
    work.go.set()
    await release(world)
    snapshot = reference(publish(world.node.store, b"x" * 8192))
    assert (await world.stub.Stage(pb.StageRequest(request_id="1", snapshot=snapshot, rung=pb.RUNG_DISK))).HasField("residency")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (NoMemory("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        (RuntimeError("can't start new thread"), grpc.StatusCode.RESOURCE_EXHAUSTED, "raise its limit of processes"),
        (MemoryError(), grpc.StatusCode.RESOURCE_EXHAUSTED, "no more memory"),
        (OSError(errno.EMFILE, "Too many open files", "/state/names"), grpc.StatusCode.RESOURCE_EXHAUSTED, "raise its limit of open files"),
        (KeyError("a bug"), grpc.StatusCode.UNKNOWN, "a bug"),
    ],
)
async def test_a_failure_is_not_remembered(world: World, work: Work, error: Exception, status: grpc.StatusCode, said: str) -> None:
    work.go.set()
    work.error = error
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await release(world)
    assert failed.value.code() is status
    assert said in str(failed.value.details())
    work.error = None
    await release(world)
    assert work.begun == 2


async def test_work_is_undone_when_all_who_asked_have_gone_and_not_before(world: World, work: Work) -> None:
    first, second = release(world), release(world)
    await until(lambda: work.begun)
    first.cancel()
    third = release(world)
    second.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await second
    work.go.set()
    await third
    assert (work.begun, work.cancelled) == (1, 0)
    work.go.clear()
    alone = release(world, "2")
    await until(lambda: work.begun == 2)
    alone.cancel()
    await until(lambda: work.cancelled)
    work.go.set()
    await release(world, "2")
    assert work.begun == 3, "what was cancelled begins anew"


async def test_an_answer_is_forgotten_when_nobody_asks_again_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an agent's memory grows with the requests that it ever had, to many megabytes."""
    clock, begun = StandingClock(), list[str]()
    requests, nobody = Requests(clock), cast(Any, None)

    async def ask(request_id: str) -> str:
        async def work() -> str:
            begun.append(request_id)
            return request_id

        return await requests.once("restore", request_id, work, nobody)

    for request_id in ("a", "b", "a"):
        assert await ask(request_id) == request_id
    assert begun == ["a", "b"]
    clock.moment += 601.0
    await ask("c")
    assert list(requests._work) == [("restore", "c")]
    await ask("a")
    assert begun == ["a", "b", "c", "a"], "it is done anew"
    monkeypatch.setattr(requests_module, "_REMEMBERED", 2)
    await ask("d")
    assert list(requests._work) == [("restore", "a"), ("restore", "d")]
