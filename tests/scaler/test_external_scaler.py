"""The rules of answering KEDA, one by one, over real sockets; the intervals are arguments, so that no test waits for real ones."""

import asyncio
import math
from collections.abc import Awaitable
from fractions import Fraction
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from zerowake_proto import externalscaler_pb2 as pb

from scaler.books.demand import Elsewhere
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.trigger import Trigger
from scaler.keda import external_scaler
from scaler.keda.external_scaler import METRIC, SERVICE, serve_external_scaler
from scaler.keda.metrics import STREAMS_OPEN, STREAMS_ROTATED
from tests.worlds.external_scaler import REPEAT, nothing_more, opened, serving
from tests.worlds.keda_client import Keda, ref
from tests.worlds.waiting import until
from zerowake_shared.address import Address
from zerowake_shared.listening import CannotListen


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({"chat": ModelLimits(), "embed": ModelLimits()})


def open_streams() -> float:
    return sum(float(STREAMS_OPEN.labels(rpc)._value.get()) for rpc in ("StreamIsActive", "StreamMetricSpec"))


async def test_unary_answers(ledger: Ledger) -> None:
    async with serving(ledger) as keda:
        spec = await keda.stub.GetMetricSpec(ref("nobody-declared-this", targetPending="2.5"))
        assert [(one.metricName, one.targetSize, one.targetSizeFloat) for one in spec.metricSpecs] == [(METRIC, 2, 2.5)]
        assert METRIC.islower()
        assert await keda.poll(ref("chat")) == (0.0, False)
        ledger.hold("chat", 1)
        ledger.start("chat")
        values = (await keda.stub.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=ref("chat"), metricName=METRIC))).metricValues
        assert [(one.metricName, one.metricValue, one.metricValueFloat) for one in values] == [(METRIC, 2, 2.0)]
        assert await keda.poll(ref("chat")) == (2.0, True)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await keda.sync(ref("chat"), "zerowake-other")
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert METRIC in (refused.value.details() or "")


@pytest.mark.parametrize("target", ["8", "1", "2.5", "0.1", "0.001", "0.3", "7.99", "1000000", "1e300"])
async def test_whole_numbers_are_worth_the_same_replicas(ledger: Ledger, target: str) -> None:
    """KEDA before 2.17 divides those that it knows, and rounds up."""
    async with serving(ledger) as keda:
        (spec,) = (await keda.stub.GetMetricSpec(ref("chat", targetPending=target))).metricSpecs
        for pending in range(40):
            request = pb.GetMetricsRequest(scaledObjectRef=ref("chat", targetPending=target), metricName=METRIC)
            (value,) = (await keda.stub.GetMetrics(request)).metricValues
            assert -(-value.metricValue // spec.targetSize) == math.ceil(pending / Fraction(target))
            assert (value.metricValue > 0) == (value.metricValueFloat > 0) == (pending > 0)
            ledger.hold("chat", 1)


async def test_any_number_of_pings_is_answered(ledger: Ledger) -> None:
    """As frames: gRPC's own clients slow down as soon as one of their pings is taken ill."""
    count, kind = 50, 6
    async with serve_external_scaler(ledger, address="127.0.0.1:0") as bound:
        host, port = Address.parse(bound)
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4))
        answered = 0
        async with asyncio.timeout(10):
            while answered < count:
                writer.write(frame(kind, answered.to_bytes(8)))
                while True:
                    head = await reader.readexactly(9)
                    payload = await reader.readexactly(int.from_bytes(head[:3]))
                    assert head[3] != 7, f"the connection is ended: {payload!r}"
                    if head[3] == kind and head[4] == 1:
                        break
                answered += 1
        writer.close()
        await writer.wait_closed()


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One of HTTP/2, about the connection."""
    return len(payload).to_bytes(3) + bytes([kind, 0]) + bytes(4) + payload


async def test_another_namespaces_object_is_never_active(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    owner = {"chat": "default"}
    foreign = ref("chat", "other")
    async with serving(ledger, repeat_seconds=REPEAT, owner=lambda model: owner.get(model, "")) as keda:
        ours, theirs = await opened(keda.watch(ref("chat"))), await opened(keda.watch(foreign))
        ledger.hold("chat", 1)
        await ours.true()
        assert await keda.poll(ref("chat")) == (1.0, True)
        assert await keda.poll(foreign) == (0.0, False)
        await nothing_more(theirs)
        assert await opened(keda.watch(foreign))  # while there is demand
        await nothing_more(theirs)
        assert caplog.text.count("ScaledObject other/chat-object names the model chat, which is namespace default's already") == 1
        owner["chat"] = "other"  # the older one was deleted
        await theirs.true()
        assert await keda.poll(foreign) == (1.0, True)
        assert await keda.poll(ref("chat")) == (0.0, False)


async def test_while_a_source_is_silent_no_call_says_that_a_model_is_idle(ledger: Ledger) -> None:
    """An error leaves the replicas as they are. What is known to be worth more is told."""
    ledger.set_elsewhere("chat", Elsewhere(unknown="redis says nothing"))
    ledger.set_replicas("chat", ready=1, replicas=1)
    async with serving(ledger) as keda:

        async def refused(call: Awaitable[object]) -> None:
            with pytest.raises(grpc.aio.AioRpcError, match="redis says nothing") as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

        chat = ref("chat", targetPending="2")
        metric = pb.GetMetricsRequest(scaledObjectRef=chat, metricName=METRIC)
        for _ in range(3):
            assert (await keda.stub.IsActive(chat)).result, "it may have been in use until its source fell silent"
        await refused(keda.stub.IsActive(chat))
        await refused(keda.stub.GetMetrics(metric))
        ledger.start("chat")
        assert (await keda.stub.IsActive(chat)).result
        await refused(keda.stub.GetMetrics(metric))
        ledger.hold("chat", 0)
        ledger.hold("chat", 0)
        assert await keda.poll(chat) == (3.0, True)
        ledger.set_elsewhere("chat", Elsewhere(pending=4))
        assert await keda.poll(chat) == (7.0, True)


async def test_a_request_between_two_polls_was_seen(ledger: Ledger) -> None:
    ledger.set_replicas("chat", ready=1, replicas=1)
    async with serving(ledger) as keda:
        assert await keda.poll(ref("chat")) == (0.0, False)
        ledger.start("chat")
        ledger.end("chat")
        assert await keda.poll(ref("chat")) == (1.0, True)
        async with asyncio.timeout(10):
            while await keda.poll(ref("chat")) != (0.0, False):
                pass


@pytest.mark.parametrize("rpc", ["IsActive", "GetMetricSpec", "GetMetrics", "StreamIsActive", "StreamMetricSpec"])
async def test_bad_metadata_is_refused_by_every_call(ledger: Ledger, rpc: str) -> None:
    bad = ref("chat", targetPendng="3")
    request = pb.GetMetricsRequest(scaledObjectRef=bad, metricName=METRIC) if rpc == "GetMetrics" else bad
    async with serving(ledger) as keda:
        call = getattr(keda.stub, rpc)(request)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            _ = [part async for part in call] if rpc.startswith("Stream") else await call
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    for word in ("ScaledObject default/chat-object", "'targetPendng'", "did you mean targetPending?", "maxStageSeconds"):
        assert word in (refused.value.details() or "")


async def test_streams_end_cleanly_at_shutdown_after_what_was_due(ledger: Ledger, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/scaler.sock"
    async with Keda(address, backoff=(0.05, 1.0)) as keda:
        async with serve_external_scaler(ledger, address=address):
            chat = await opened(keda.watch(ref("chat")))
            metric_spec = keda.stub.StreamMetricSpec(ref("chat", targetPending="3"))
            first = await metric_spec.read()
            assert isinstance(first, pb.GetMetricSpecResponse)
            assert first.metricSpecs[0].targetSizeFloat == 3
            ledger.hold("chat", 1)  # in the same turn as the shutdown
        await chat.true()
        async with asyncio.timeout(10):
            assert await chat.ends.get() is None
            assert await metric_spec.code() == grpc.StatusCode.OK


async def test_old_streams_are_rotated_but_not_while_a_model_waits_for_a_replica(ledger: Ledger) -> None:
    async with serving(ledger, stream_age_seconds=0.2, repeat_seconds=REPEAT) as keda:
        chat, embed = await opened(keda.watch(ref("chat"))), await opened(keda.watch(ref("embed")))
        ledger.hold("embed", 1)
        for _ in range(3):
            async with asyncio.timeout(10):
                assert await chat.ends.get() is None
        assert embed.ends.empty()
        ledger.set_replicas("embed", ready=1, replicas=1)
        async with asyncio.timeout(10):
            assert await embed.ends.get() is None


def connections(address: str) -> int:
    """How many TCP connections the server at `address` has."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{table}").read_text().splitlines()]
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)  # 01: established


async def test_an_old_connection_is_left_for_a_new_one_without_ending_its_streams(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_scaler, "CONNECTION_AGE_SECONDS", 0.2)
    async with serve_external_scaler(ledger, address="127.0.0.1:0") as bound, Keda(bound) as keda:
        chat = await opened(keda.watch(ref("chat")))
        assert connections(bound) >= 1  # the first may be old already
        async with asyncio.timeout(10):
            while connections(bound) < 2:  # the old one, kept by its streams, and the one that new calls go to
                assert await keda.poll(ref("chat")) == (0.0, False)
        ledger.hold("chat", 1)
        await chat.true()
        assert chat.ends.empty()


async def test_a_client_that_leaves_leaves_nothing_behind(ledger: Ledger) -> None:
    age, rotated = 0.4, STREAMS_ROTATED.labels("StreamIsActive")._value.get()
    async with serve_external_scaler(ledger, address="127.0.0.1:0", stream_age_seconds=age) as bound:
        before = len(asyncio.all_tasks())
        async with Keda(bound) as keda:
            for model in ("chat", "embed"):
                await opened(keda.watch(ref(model)))
            assert open_streams() == 4
        await until(lambda: open_streams() == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        await asyncio.sleep(1.3 * age)  # the longest that a timer of theirs could have left
    assert STREAMS_ROTATED.labels("StreamIsActive")._value.get() == rotated


async def test_the_planner_hears_of_the_longest_staging(ledger: Ledger) -> None:
    heard: list[Trigger] = []
    async with serving(ledger, on_trigger=heard.append) as keda:
        await opened(keda.watch(ref("chat", maxStageSeconds="4")))
    assert heard == [Trigger("chat", 8.0, 4.0)]


async def test_health_and_reflection(ledger: Ledger) -> None:
    async with serving(ledger) as keda:
        checks = health_pb2_grpc.HealthStub(keda.channel)
        for service in ("", SERVICE):
            answer = await checks.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(keda.channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        services = [service.name async for answer in call for service in answer.list_services_response.service]
        assert {SERVICE, "grpc.health.v1.Health"} <= set(services)


async def test_addresses(ledger: Ledger, tmp_path: Path) -> None:
    socket = f"unix:{tmp_path}/scaler.sock"
    async with serve_external_scaler(ledger, address=socket) as bound, Keda(bound) as keda:
        assert bound == socket
        assert await keda.poll(ref("chat")) == (0.0, False)
    async with serve_external_scaler(ledger, address="127.0.0.1:0") as bound:
        with pytest.raises(CannotListen, match=bound):
            async with serve_external_scaler(ledger, address=bound):
                pass


async def test_what_is_no_scaled_object_is_refused_with_the_reason(ledger: Ledger) -> None:
    async def why_not(namespace: str, name: str) -> str:
        return f"{namespace}/{name} is a ScaledJob" if name == "job" else ""

    async with serving(ledger, why_not=why_not) as keda:
        await keda.stub.IsActive(ref("chat"))
        job = ref("chat")
        job.name = "job"
        for call in (keda.stub.IsActive, keda.stub.GetMetricSpec):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(job)
            assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION and "is a ScaledJob" in (refused.value.details() or "")
