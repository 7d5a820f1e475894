"""What KEDA is pushed over its streams: first requests at once, repeats while there is no replica, and the use of what is there."""

import asyncio
import contextlib
import time
from itertools import pairwise

import grpc
import pytest
from prometheus_client import REGISTRY

from scaler.books.activation import Activations
from scaler.books.demand import Elsewhere
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from tests.worlds.external_scaler import QUIET, REPEAT, nothing_more, opened, serving
from tests.worlds.keda_client import ref
from tests.worlds.waiting import until


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({"chat": ModelLimits(), "embed": ModelLimits()})


async def test_the_first_request_is_pushed_once_and_marked(ledger: Ledger) -> None:
    activations = Activations()
    async with serving(ledger, activations=activations) as keda:
        chat, embed = await opened(keda.watch(ref("chat"))), await opened(keda.watch(ref("embed")))
        activation = activations.begin("chat")
        ledger.hold("chat", 100)
        await chat.true()
        ledger.hold("chat", 100)
        await nothing_more(chat)
        assert embed.trues.empty()
        assert "pushed" in activation.phases


async def test_each_edge_at_zero_is_pushed(ledger: Ledger) -> None:
    async with serving(ledger) as keda:
        chat = await opened(keda.watch(ref("chat")))
        for _ in range(3):
            ledger.hold("chat", 1)
            await chat.true()
            ledger.leave("chat", 1)
        await nothing_more(chat)


async def test_repeats_only_while_there_is_demand_and_no_replica(ledger: Ledger) -> None:
    async with serving(ledger, repeat_seconds=REPEAT) as keda:
        chat = await opened(keda.watch(ref("chat")))
        ledger.hold("chat", 1)
        times = [await chat.true() for _ in range(4)]
        assert min(later - earlier for earlier, later in pairwise(times)) > REPEAT / 2
        ledger.set_replicas("chat", ready=1, replicas=1)
        ledger.hand_over("chat", 1)
        while not chat.trues.empty():
            chat.trues.get_nowait()
        await nothing_more(chat)  # work in flight on a replica is nothing to push
        ledger.set_replicas("chat", ready=0, replicas=0)
        for _ in range(3):
            await chat.true()  # the replica is lost and its request is not: that is an edge, and then repeats
        ledger.end("chat")
        await asyncio.sleep(0)
        while not chat.trues.empty():
            chat.trues.get_nowait()
        await nothing_more(chat)


async def test_a_request_while_the_last_replica_drains_is_pushed(ledger: Ledger) -> None:
    async with serving(ledger) as keda:
        ledger.set_replicas("chat", ready=0, replicas=1)
        chat = await opened(keda.watch(ref("chat")))
        ledger.hold("chat", 1)
        await chat.true()


async def test_above_zero_edges_are_pushed_but_not_twice_in_an_interval(ledger: Ledger) -> None:
    ledger.set_replicas("chat", ready=1, replicas=1)
    async with serving(ledger, repeat_seconds=REPEAT) as keda:
        chat = await opened(keda.watch(ref("chat")))
        ledger.start("chat")
        first = await chat.true()
        end = time.monotonic() + 3 * REPEAT
        while time.monotonic() < end:  # a model that is asked now and then, each request shorter than the interval
            ledger.end("chat")
            await asyncio.sleep(0.005)
            ledger.start("chat")
            await asyncio.sleep(0.005)
        ledger.end("chat")
        await chat.true()
        times = [first, *(chat.trues.get_nowait() for _ in range(chat.trues.qsize()))]
        assert 1 <= len(times) <= 2 + (time.monotonic() - first) / REPEAT
        assert min((later - earlier for earlier, later in pairwise(times)), default=REPEAT) > REPEAT / 2
        with contextlib.suppress(TimeoutError):  # the end of the last one, unless that was it
            await chat.true(within=QUIET)
        await nothing_more(chat)


async def test_a_stream_that_opens_under_demand_is_told_at_once(ledger: Ledger) -> None:
    ledger.hold("chat", 1)
    ledger.set_replicas("embed", ready=1, replicas=1)
    ledger.start("embed")
    async with serving(ledger) as keda:
        for model in ("chat", "embed"):
            watched = keda.watch(ref(model))
            await watched.true()
            await nothing_more(watched)


async def test_latency_counts_pushes_for_a_first_request_only(ledger: Ledger) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("zerowake_keda_push_seconds_count") or 0.0

    before = counted()
    ledger.hold("chat", 1)  # no stream is open, and the planner makes a replica by itself
    ledger.set_replicas("chat", ready=1, replicas=1)
    ledger.hand_over("chat", 1)
    async with serving(ledger) as keda:
        await keda.watch(ref("chat")).true()
        embed = await opened(keda.watch(ref("embed")))
        assert counted() == before
        ledger.hold("embed", 1)
        await embed.true()
        await until(lambda: counted() == before + 1)


async def test_every_stream_of_a_model_is_told(ledger: Ledger) -> None:
    async with serving(ledger) as keda:
        objects = [await opened(keda.watch(ref("chat"))) for _ in range(3)]
        ledger.hold("chat", 1)
        for watched in objects:
            await watched.true()
            await nothing_more(watched)


async def test_a_model_declared_later_is_waited_for(ledger: Ledger) -> None:
    async with serving(ledger, repeat_seconds=REPEAT) as keda:
        later = await opened(keda.watch(ref("later")))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await keda.poll(ref("later"))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert "'later'" in (refused.value.details() or "")
        assert "embed" not in (refused.value.details() or ""), "it may be somebody else's"
        for _ in range(2):  # and a model may come back
            ledger.declare("later", ModelLimits())
            ledger.hold("later", 1)
            await later.true()
            await later.true()
            ledger.leave("later", 1)
            ledger.withdraw("later")
            await asyncio.sleep(0)
            while not later.trues.empty():
                later.trues.get_nowait()
            await nothing_more(later)
        assert later.ends.empty()


async def test_what_is_asked_elsewhere_is_pushed(ledger: Ledger) -> None:
    async with serving(ledger, repeat_seconds=REPEAT) as keda:
        watched = await opened(keda.watch(ref("chat")))
        ledger.set_elsewhere("chat", Elsewhere(unknown="redis says nothing"))
        await nothing_more(watched)
        ledger.set_elsewhere("chat", Elsewhere(pending=1))
        await watched.true()
